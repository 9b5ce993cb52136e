//! Admin commands (NVMe Base 2.0, chapter 5).

use crate::command::{ALL_NAMESPACES, Command, admin};
use crate::controller::{Controller, Outcome, Shadow};
use crate::data_pointer::{Direction, transfer_error};
use crate::features::Granted;
use crate::namespace::formats;
use crate::queue::{CompletionQueue, SubmissionQueue};
use crate::status::Status;
use crate::{features, identify, log_page};

/// Carries an admin command out.
pub(crate) fn execute(controller: &mut Controller, command: &Command) -> Result<Outcome, Status> {
    // Admin commands use PRPs over PCI Express (4.1).
    if command.data_pointer_kind() != 0 {
        return Err(Status::INVALID_FIELD);
    }
    controller.offers.check_admin(command.opcode())?;
    let done = |()| Outcome::Done(0);
    match command.opcode() {
        admin::DELETE_SQ => delete_sq(controller, command).map(done),
        admin::CREATE_SQ => create_sq(controller, command).map(done),
        admin::DELETE_CQ => delete_cq(controller, command).map(done),
        admin::CREATE_CQ => create_cq(controller, command).map(done),
        admin::IDENTIFY => {
            let page = identify::identify(controller, command)?;
            give(controller, command, &page).map(done)
        }
        admin::GET_LOG_PAGE => {
            let page = log_page::get(controller, command)?;
            give(controller, command, &page).map(done)
        }
        admin::GET_FEATURES => features::get(controller, command).map(Outcome::Done),
        admin::SET_FEATURES => features::set(controller, command).map(Outcome::Done),
        admin::ABORT => Ok(Outcome::Done(abort(controller, command))),
        admin::ASYNC_EVENT => {
            controller.events.wait(command.id(), controller.offers.event_requests)?;
            controller.deliver_events();
            Ok(Outcome::Later)
        }
        admin::DOORBELL_BUFFER => doorbell_buffer(controller, command).map(done),
        admin::FORMAT => format(controller, command).map(done),
        _ => Err(Status::INVALID_OPCODE),
    }
}

/// Returns data to the host.
fn give(controller: &mut Controller, command: &Command, data: &[u8]) -> Result<(), Status> {
    controller.pointers.walk(&controller.view, command, data.len() as u64, Direction::ToHost)?;
    let mut at = 0;
    for piece in &controller.pointers.pieces {
        let end = at + piece.bytes as usize;
        if let Some(iova) = piece.iova {
            controller.view.write(iova, &data[at..end]).map_err(transfer_error)?;
        }
        at = end;
    }
    Ok(())
}

/// Takes data from the host.
pub(crate) fn take(controller: &mut Controller, command: &Command, data: &mut [u8]) -> Result<(), Status> {
    controller.pointers.walk(&controller.view, command, data.len() as u64, Direction::FromHost)?;
    let mut at = 0;
    for piece in &controller.pointers.pieces {
        let end = at + piece.bytes as usize;
        if let Some(iova) = piece.iova {
            controller.view.read(iova, &mut data[at..end]).map_err(transfer_error)?;
        }
        at = end;
    }
    Ok(())
}

/// Identifier, base address and size of a queue to be made; the checks that both kinds share.
fn new_queue(controller: &Controller, command: &Command, most: u16, exists: bool) -> Result<(u16, u64, u32), Status> {
    let (id, size) = (command.dword(10) as u16, (command.dword(10) >> 16) + 1);
    if id == 0 || id > most || exists {
        return Err(Status::INVALID_QUEUE_ID);
    }
    if size < 2 || size > controller.shared.config.queue_entries {
        return Err(Status::INVALID_QUEUE_SIZE);
    }
    // CAP.CQR: queues are physically contiguous.
    if command.dword(11) & 1 == 0 {
        return Err(Status::INVALID_FIELD);
    }
    if !command.prp1().is_multiple_of(controller.pointers.page) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    Ok((id, command.prp1(), size))
}

/// CC.IOSQES and CC.IOCQES must name the entry sizes before I/O queues are made (3.1.3.5).
fn check_entry_size(controller: &Controller, shift: u32, wanted: u32) -> Result<(), Status> {
    let have = controller.shared.registers().configuration >> shift & 15;
    if have == wanted {
        return Ok(());
    }
    log::warn!("CC bits {}:{shift} say that queue entries have 2^{have} bytes, not 2^{wanted}", shift + 3);
    Err(Status::INVALID_QUEUE_SIZE)
}

fn exists<T>(queues: &[Option<T>], id: u16) -> bool {
    queues.get(usize::from(id)).is_some_and(Option::is_some)
}

fn create_cq(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let taken = exists(&controller.cqs, command.dword(10) as u16);
    let (id, base, size) = new_queue(controller, command, controller.features.queues().completion, taken)?;
    check_entry_size(controller, 20, 4)?;
    let dword11 = command.dword(11);
    let vector = (dword11 >> 16) as u16;
    if vector >= controller.shared.layout.vectors {
        return Err(Status::INVALID_VECTOR);
    }
    controller.shared.clear_doorbell(id, true);
    let vector = (dword11 & 2 != 0).then_some(vector);
    controller.cqs[usize::from(id)] = Some(CompletionQueue::new(base, size, vector));
    Ok(())
}

fn create_sq(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let taken = exists(&controller.sqs, command.dword(10) as u16);
    let (id, base, size) = new_queue(controller, command, controller.features.queues().submission, taken)?;
    check_entry_size(controller, 16, 6)?;
    let cq = (command.dword(11) >> 16) as u16;
    if cq == 0 || cq > controller.features.queues().completion {
        return Err(Status::INVALID_QUEUE_ID);
    }
    let Some(queue) = &mut controller.cqs[usize::from(cq)] else { return Err(Status::CQ_INVALID) };
    queue.users += 1;
    controller.shared.clear_doorbell(id, false);
    controller.sqs[usize::from(id)] = Some(SubmissionQueue::new(base, size, cq));
    controller.live.push(id);
    Ok(())
}

fn delete_sq(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let id = command.dword(10) as u16;
    if id == 0 || !exists(&controller.sqs, id) {
        return Err(Status::INVALID_QUEUE_ID);
    }
    // Commands that a fault holds back end now; their completions come before this one's.
    controller.end_held(id, None, Status::ABORTED_SQ_DELETION);
    controller.drop_late(id);
    let Some(sq) = controller.sqs[usize::from(id)].take() else { return Err(Status::INVALID_QUEUE_ID) };
    if let Some(cq) = &mut controller.cqs[usize::from(sq.cq)] {
        cq.users -= 1;
    }
    controller.live.retain(|live| *live != id);
    controller.shared.clear_doorbell(id, false);
    Ok(())
}

fn delete_cq(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let id = command.dword(10) as u16;
    let Some(Some(cq)) = controller.cqs.get(usize::from(id)).filter(|_| id != 0) else {
        return Err(Status::INVALID_QUEUE_ID);
    };
    if cq.users > 0 {
        return Err(Status::INVALID_QUEUE_DELETION);
    }
    controller.cqs[usize::from(id)] = None;
    controller.shared.clear_doorbell(id, true);
    Ok(())
}

/// Abort (5.1): dword 0 bit 0 is 0 if the command was aborted. Only commands that wait can be.
fn abort(controller: &mut Controller, command: &Command) -> u32 {
    let (sq, id) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
    if controller.faults.plan.never_aborts {
        return 1;
    }
    if sq == 0 && controller.events.abort(id) {
        let completion = crate::command::Completion { result: 0, sq, id, status: Status::ABORT_REQUESTED };
        controller.post(completion);
        return 0;
    }
    u32::from(controller.end_held(sq, Some(id), Status::ABORT_REQUESTED) == 0)
}

/// Doorbell Buffer Config (5.8). The current doorbells are written to the buffer, so that queues made before go on.
fn doorbell_buffer(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let shadow = Shadow { doorbells: command.prp1(), event_idx: command.prp2() };
    let page = controller.pointers.page;
    if !shadow.doorbells.is_multiple_of(page) || !shadow.event_idx.is_multiple_of(page) {
        return Err(Status::PRP_OFFSET_INVALID);
    }
    for iova in [shadow.doorbells, shadow.event_idx] {
        controller.view.check(iova, page as usize, true).map_err(transfer_error)?;
    }
    // Both buffers are one page: only the queues whose doorbells fit there can be shadowed.
    let Granted { submission, completion } = controller.features.queues();
    let last = controller.shared.doorbell_offset(submission.max(completion), true) as u64 + 4;
    if last > page {
        log::warn!("Doorbell Buffer Config: {last} bytes of doorbells do not fit in a page of {page} bytes");
        return Err(Status::INVALID_FIELD);
    }
    for id in 1..controller.sqs.len() as u16 {
        let tail = controller.sqs[usize::from(id)].map_or(0, |sq| sq.tail);
        let head = controller.cqs[usize::from(id)].map_or(0, |cq| cq.head);
        let offsets = [false, true].map(|completion| controller.shared.doorbell_offset(id, completion) as u64);
        for (offset, value) in offsets.into_iter().zip([tail, head]) {
            controller.view.store_u32(shadow.doorbells + offset, value).map_err(transfer_error)?;
            controller.view.store_u32(shadow.event_idx + offset, value).map_err(transfer_error)?;
        }
    }
    controller.shadow = Some(shadow);
    Ok(())
}

/// Format NVM (5.14): a new block size, or the old one; the namespace reads zero afterwards.
fn format(controller: &mut Controller, command: &Command) -> Result<(), Status> {
    let dword10 = command.dword(10);
    let (index, extended, protection, erase) =
        (dword10 & 15 | dword10 >> 8 & 0x30, dword10 >> 4 & 1, dword10 >> 5 & 7, dword10 >> 9 & 7);
    let format = formats(&controller.shared.config).get(index as usize).copied().ok_or(Status::INVALID_FORMAT)?;
    if extended != 0 && format.metadata != 0 || protection != 0 {
        return Err(Status::INVALID_FORMAT);
    }
    // User data erase is what deallocating does; cryptographic erase is not supported (FNA bit 2).
    if erase > 1 {
        return Err(Status::INVALID_FIELD);
    }
    let id = command.namespace();
    let chosen = |namespace: &crate::namespace::Namespace| id == ALL_NAMESPACES || namespace.id == id;
    if !controller.namespaces.iter().flatten().any(chosen) {
        return Err(Status::INVALID_NAMESPACE);
    }
    if controller.namespaces.iter().flatten().any(|namespace| chosen(namespace) && namespace.read_only) {
        return Err(Status::WRITE_PROTECTED);
    }
    for namespace in controller.namespaces.iter_mut().flatten().filter(|namespace| chosen(namespace)) {
        if let Err(error) = namespace.reformat(format) {
            log::error!("formatting namespace {}: {error}", namespace.id);
            return Err(Status::INTERNAL_ERROR);
        }
    }
    Ok(())
}

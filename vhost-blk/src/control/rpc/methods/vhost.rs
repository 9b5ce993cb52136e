//! Disks, which SPDK calls vhost controllers.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::cpu_mask::cpu_mask;
use super::{Context, RpcError};
use crate::vhost_user::{FrontEnd, Server};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ControllersParams {
    name: Option<String>,
}

/// In SPDK's order.
#[derive(Serialize)]
pub(super) struct Controller {
    ctrlr: String,
    cpumask: String,
    delay_base_us: u32,
    iops_threshold: u32,
    socket: String,
    sessions: Vec<SessionInfo>,
    backend_specific: BackendSpecific,
}

#[derive(Serialize)]
struct SessionInfo {
    vid: u64,
    id: u64,
    name: String,
    started: bool,
    max_queues: u16,
}

#[derive(Serialize)]
struct BackendSpecific {
    block: Block,
}

#[derive(Serialize)]
struct Block {
    readonly: bool,
    bdev: String,
    transport: &'static str,
}

/// What SPDK tells where nobody has set another one; without a delay it has no effect.
const IOPS_THRESHOLD: u32 = 60000;

/// The disks that are served, or the one of a name.
pub(super) fn controllers(context: &mut Context, params: ControllersParams) -> Result<Vec<Controller>, RpcError> {
    let served = context.registry.served();
    let all = served.servers.iter().map(|server| (name(&server.export().name), server));
    let wanted = all.filter(|(name, _)| params.name.as_ref().is_none_or(|wanted| wanted == name));
    let found: Vec<Controller> = wanted.map(|(name, server)| controller(context, name, server)).collect();
    if found.is_empty() && params.name.is_some() {
        return Err(RpcError::NoSuchDevice);
    }
    Ok(found)
}

/// The file name of its socket, which is what SPDK makes a socket of.
fn name(socket: &str) -> String {
    Path::new(socket).file_name().map_or_else(|| socket.to_owned(), |name| name.to_string_lossy().into_owned())
}

fn controller(context: &Context, name: String, server: &Server) -> Controller {
    let export = server.export();
    let placement = context.registry.pool.placement();
    let cpus: Vec<Option<usize>> = export.workers().all().iter().map(|worker| placement.cpu_of(*worker)).collect();
    let session = |FrontEnd { number, rings, .. }| SessionInfo {
        vid: number,
        id: number,
        name: format!("{name}s{number}"),
        started: rings > 0,
        max_queues: rings,
    };
    let sessions = server.front_ends().into_iter().filter(|front_end| front_end.spoken).map(session).collect();
    Controller {
        cpumask: cpu_mask(&cpus),
        delay_base_us: 0,
        iops_threshold: IOPS_THRESHOLD,
        socket: export.name.clone(),
        sessions,
        backend_specific: BackendSpecific {
            block: Block {
                readonly: export.is_read_only(),
                bdev: format!("{}n{}", export.device(), export.known().namespace.id),
                transport: "vhost_user_blk",
            },
        },
        ctrlr: name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_the_name_of_its_socket() {
        assert_eq!(name("/run/vhost-blk/disk0.sock"), "disk0.sock");
        assert_eq!(name("disk0"), "disk0");
        assert_eq!(name("file descriptor 5"), "file descriptor 5");
    }
}

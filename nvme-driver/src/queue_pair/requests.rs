//! Requests of several commands: one completion for all of them.

use super::slots::NO_REQUEST;
use crate::Status;

/// One request of several commands.
#[derive(Clone, Copy, Debug)]
struct Request {
    token: u64,
    /// Commands the controller has.
    outstanding: u32,
    /// Commands are still to be issued.
    more: bool,
    /// The first error, else success.
    status: Status,
    reported: bool,
}

/// What became of a request when one of its commands completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Other commands are out or to be issued.
    Continues,
    /// That was the last one.
    Finished { token: u64, status: Status },
}

/// All requests of several commands of a queue pair.
pub(crate) struct Requests {
    requests: Box<[Request]>,
    free: Vec<u16>,
}

impl Requests {
    /// Room for `count` requests: each has a command out while it lives, or a place among the long ones.
    pub(super) fn new(count: usize) -> Requests {
        let count = count.min(usize::from(NO_REQUEST)) as u16;
        let empty = Request { token: 0, outstanding: 0, more: false, status: Status::SUCCESS, reported: false };
        Requests { requests: vec![empty; usize::from(count)].into_boxed_slice(), free: (0..count).rev().collect() }
    }

    /// A new request without commands.
    pub(super) fn begin(&mut self, token: u64) -> Option<u16> {
        let at = self.free.pop()?;
        let fresh = Request { token, outstanding: 0, more: true, status: Status::SUCCESS, reported: false };
        *self.requests.get_mut(usize::from(at))? = fresh;
        Some(at)
    }

    /// A command of the request was issued; `more`: it was not the last one.
    pub(super) fn issued(&mut self, at: u16, more: bool) {
        if let Some(request) = self.requests.get_mut(usize::from(at)) {
            request.outstanding += 1;
            request.more = more;
        }
    }

    /// A command of the request completed. After an error no further command need be issued: see [`Requests::failed`].
    pub(super) fn completed(&mut self, at: u16, status: Status) -> Outcome {
        let Some(request) = self.requests.get_mut(usize::from(at)) else { return Outcome::Continues };
        request.outstanding -= 1;
        if request.status.is_success() {
            request.status = status;
        }
        // The rest of a failed request is not issued: what it would do cannot be told from the outside.
        if request.outstanding > 0 || request.more && request.status.is_success() {
            return Outcome::Continues;
        }
        let finished = Outcome::Finished { token: request.token, status: request.status };
        self.free.push(at);
        finished
    }

    /// Has a command of the request failed?
    pub(super) fn failed(&self, at: u16) -> bool {
        self.requests.get(usize::from(at)).is_some_and(|request| !request.status.is_success())
    }

    /// The request's token, the first time it is asked for.
    pub(super) fn report(&mut self, at: u16) -> Option<u64> {
        let request = self.requests.get_mut(usize::from(at))?;
        (!std::mem::replace(&mut request.reported, true)).then_some(request.token)
    }

    /// No further command of the request is issued; `status`: what became of it, unless a command has failed before. Its token and
    /// its status if none is out, which ends it.
    pub(super) fn end(&mut self, at: u16, status: Status) -> Option<(u64, Status)> {
        let request = self.requests.get_mut(usize::from(at))?;
        request.more = false;
        if request.status.is_success() {
            request.status = status;
        }
        if request.outstanding > 0 {
            return None;
        }
        self.free.push(at);
        Some((request.token, request.status))
    }

    /// A command of a request that is being given up; the token when it was the last one.
    pub(super) fn abandon(&mut self, at: u16) -> Option<u64> {
        let request = self.requests.get_mut(usize::from(at))?;
        request.more = false;
        match self.completed(at, Status::ABORTED_BY_HOST) {
            Outcome::Finished { token, .. } => Some(token),
            Outcome::Continues => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_is_the_requests_status() {
        let mut requests = Requests::new(2);
        let at = requests.begin(77).unwrap();
        requests.issued(at, true);
        requests.issued(at, true);
        requests.issued(at, false);
        assert_eq!(requests.completed(at, Status::SUCCESS), Outcome::Continues);
        assert_eq!(requests.completed(at, Status::UNRECOVERED_READ), Outcome::Continues);
        assert!(requests.failed(at));
        let finished = Outcome::Finished { token: 77, status: Status::UNRECOVERED_READ };
        assert_eq!(requests.completed(at, Status::INTERNAL_ERROR), finished);
    }

    #[test]
    fn a_request_with_commands_to_come_is_not_finished_unless_it_failed() {
        let mut requests = Requests::new(1);
        let at = requests.begin(1).unwrap();
        assert_eq!(requests.begin(2), None);
        requests.issued(at, true);
        assert_eq!(requests.completed(at, Status::SUCCESS), Outcome::Continues);
        requests.issued(at, true);
        let status = Status::WRITE_FAULT;
        assert_eq!(requests.completed(at, status), Outcome::Finished { token: 1, status });
        assert_eq!(requests.begin(2), Some(at));
        requests.issued(at, true);
        assert_eq!((requests.report(at), requests.report(at)), (Some(2), None));
        requests.issued(at, true);
        assert_eq!((requests.abandon(at), requests.abandon(at)), (None, Some(2)));
    }

    #[test]
    fn a_request_that_is_given_up_ends_when_nothing_of_it_is_out() {
        let mut requests = Requests::new(1);
        let aborted = Status::ABORTED_BY_HOST;
        let at = requests.begin(1).unwrap();
        assert_eq!(requests.end(at, aborted), Some((1, aborted)), "none was issued");
        for (answer, status) in [(Status::SUCCESS, aborted), (Status::WRITE_FAULT, aborted)] {
            let at = requests.begin(2).unwrap();
            requests.issued(at, true);
            requests.issued(at, true);
            assert_eq!(requests.end(at, aborted), None);
            assert_eq!(requests.completed(at, answer), Outcome::Continues);
            assert_eq!(requests.completed(at, answer), Outcome::Finished { token: 2, status });
        }
        let at = requests.begin(3).unwrap();
        requests.issued(at, true);
        requests.issued(at, true);
        assert_eq!(requests.completed(at, Status::WRITE_FAULT), Outcome::Continues);
        assert_eq!(requests.end(at, aborted), None);
        let finished = Outcome::Finished { token: 3, status: Status::WRITE_FAULT };
        assert_eq!(requests.completed(at, Status::SUCCESS), finished, "the first error stays");
        assert!(requests.begin(4).is_some());
    }
}

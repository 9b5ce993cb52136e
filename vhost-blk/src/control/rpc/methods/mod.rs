//! The methods, in one table. A method has the name and the parameters that SPDK gives it, and one handler.

mod cpu_mask;
mod framework;
mod log_level;
mod process;
mod vhost;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::context::Context;
use super::error::RpcError;

/// A method.
#[derive(Clone, Copy)]
pub(super) struct Method {
    /// What clients call.
    pub(super) name: &'static str,
    /// It belongs to SPDK's state before its initialisation, which this program is never in.
    before_init: bool,
    /// It changes something: a line in the log says who has called it.
    pub(super) changes: bool,
    /// Carries it out; the result is JSON.
    pub(super) run: fn(&mut Context, Value) -> Result<Vec<u8>, RpcError>,
}

impl Method {
    const fn reads(name: &'static str, run: fn(&mut Context, Value) -> Result<Vec<u8>, RpcError>) -> Method {
        Method { name, before_init: false, changes: false, run }
    }

    const fn changes(name: &'static str, run: fn(&mut Context, Value) -> Result<Vec<u8>, RpcError>) -> Method {
        Method { name, before_init: false, changes: true, run }
    }
}

/// All of them, in the order in which they are listed.
pub(super) const METHODS: &[Method] = &[
    Method::reads("spdk_get_version", |context, params| typed(context, params, process::version)),
    Method::reads("rpc_get_methods", |context, params| typed(context, params, process::methods)),
    Method::changes("spdk_kill_instance", |context, params| typed(context, params, process::kill)),
    Method::reads("framework_get_subsystems", |context, params| typed(context, params, framework::subsystems)),
    Method::reads("framework_get_config", |context, params| typed(context, params, framework::config)),
    Method::reads("framework_wait_init", |context, params| typed(context, params, framework::wait_init)),
    Method {
        before_init: true,
        ..Method::reads("framework_start_init", |context, params| typed(context, params, framework::start_init))
    },
    Method::reads("framework_get_reactors", |context, params| typed(context, params, framework::reactors)),
    Method::reads("thread_get_stats", |context, params| typed(context, params, framework::threads)),
    Method::changes("log_set_level", |context, params| typed(context, params, log_level::set)),
    Method::reads("log_get_level", |context, params| typed(context, params, log_level::get)),
    Method::reads("vhost_get_controllers", |context, params| typed(context, params, vhost::controllers)),
];

/// The method of a name.
pub(super) fn find(name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.name == name)
}

/// Has a handler called with the parameters that it wants.
fn typed<P: DeserializeOwned, R: Serialize>(
    context: &mut Context,
    params: Value,
    handler: fn(&mut Context, P) -> Result<R, RpcError>,
) -> Result<Vec<u8>, RpcError> {
    let params = P::deserialize(params).map_err(|error| RpcError::InvalidParams(error.to_string()))?;
    let result = handler(context, params)?;
    serde_json::to_vec(&result).map_err(|error| RpcError::Internal(error.to_string()))
}

/// The parameters of a method that has none.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoParams {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_there_twice() {
        for (index, method) in METHODS.iter().enumerate() {
            assert!(METHODS[..index].iter().all(|earlier| earlier.name != method.name), "{}", method.name);
            assert_eq!(find(method.name).map(|found| found.name), Some(method.name));
        }
        assert!(find("vhost_create_scsi_controller").is_none());
    }
}

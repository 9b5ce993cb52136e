//! What the program is, and how it ends.

use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::{Context, METHODS, NoParams, RpcError};

#[derive(Serialize)]
pub(super) struct Version {
    version: &'static str,
    fields: VersionFields,
}

#[derive(Serialize)]
struct VersionFields {
    major: u32,
    minor: u32,
    patch: u32,
    suffix: &'static str,
}

/// The version of this program, in SPDK's form.
pub(super) fn version(_: &mut Context, _: NoParams) -> Result<Version, RpcError> {
    let number = |text: &str| text.parse().unwrap_or_default();
    Ok(Version {
        version: concat!("vhost-blk v", env!("CARGO_PKG_VERSION")),
        fields: VersionFields {
            major: number(env!("CARGO_PKG_VERSION_MAJOR")),
            minor: number(env!("CARGO_PKG_VERSION_MINOR")),
            patch: number(env!("CARGO_PKG_VERSION_PATCH")),
            suffix: env!("CARGO_PKG_VERSION_PRE"),
        },
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MethodsParams {
    /// Only those that may be called now: all that are listed may.
    #[serde(default, rename = "current")]
    _current: bool,
    /// There are no aliases.
    #[serde(default, rename = "include_aliases")]
    _include_aliases: bool,
}

/// The names of the methods. Those of SPDK's state before its initialisation are left out whether or not `current` is asked for:
/// `load_config` of SPDK's client calls `framework_start_init` for a file without settings if it is listed, and fails.
pub(super) fn methods(_: &mut Context, _: MethodsParams) -> Result<Vec<&'static str>, RpcError> {
    Ok(METHODS.iter().filter(|method| !method.before_init).map(|method| method.name).collect())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KillParams {
    sig_name: String,
}

/// Sends the program a signal, which does what it does when it comes from elsewhere. The answer goes out before.
pub(super) fn kill(context: &mut Context, params: KillParams) -> Result<bool, RpcError> {
    let signals = [
        ("SIGINT", Signal::INT),
        ("SIGTERM", Signal::TERM),
        ("SIGQUIT", Signal::QUIT),
        ("SIGHUP", Signal::HUP),
        ("SIGKILL", Signal::KILL),
        ("SIGUSR1", Signal::USR1),
    ];
    let found = signals.iter().find(|(name, _)| *name == params.sig_name);
    let (_, signal) = found.ok_or_else(|| {
        let names = signals.map(|(name, _)| name).join(", ");
        RpcError::InvalidParams(format!("sig_name is none of {names}"))
    })?;
    context.signal = Some(*signal);
    Ok(true)
}

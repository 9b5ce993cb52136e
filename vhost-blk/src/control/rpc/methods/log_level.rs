//! How much is logged.

use serde::Deserialize;

use super::{Context, NoParams, RpcError};
use crate::control::logging::{self, Level};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LevelParams {
    level: String,
}

/// Sets it, for all parts of the program.
pub(super) fn set(_: &mut Context, params: LevelParams) -> Result<bool, RpcError> {
    let level = Level::named(&params.level).ok_or_else(|| {
        let names = Level::ALL.map(Level::name).join(", ");
        RpcError::InvalidParams(format!("level is none of {names}"))
    })?;
    logging::set_level(level).map_err(|error| RpcError::Internal(error.to_string()))?;
    Ok(true)
}

/// Tells it. What RUST_LOG has asked for is told by the nearest name.
pub(super) fn get(_: &mut Context, _: NoParams) -> Result<&'static str, RpcError> {
    Ok(logging::level().map_or("DISABLED", Level::name))
}

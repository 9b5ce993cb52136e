//! What SPDK calls its framework: subsystems, initialisation, reactors (which are the workers here).

use serde::{Deserialize, Serialize};

use super::cpu_mask::cpu_mask;
use super::{Context, NoParams, RpcError};

#[derive(Clone, Copy, Serialize)]
pub(super) struct Subsystem {
    subsystem: &'static str,
    depends_on: &'static [&'static str],
}

/// In the order in which a configuration is loaded; each after those that it depends on.
const SUBSYSTEMS: [Subsystem; 2] =
    [Subsystem { subsystem: "bdev", depends_on: &[] }, Subsystem { subsystem: "vhost_blk", depends_on: &["bdev"] }];

/// The subsystems.
pub(super) fn subsystems(_: &mut Context, _: NoParams) -> Result<[Subsystem; 2], RpcError> {
    Ok(SUBSYSTEMS)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConfigParams {
    name: String,
    #[serde(default, rename = "with_batches")]
    _with_batches: bool,
}

/// The calls that would make a subsystem as it is. There are none: what is served was described on the command line or in a file.
pub(super) fn config(_: &mut Context, params: ConfigParams) -> Result<Option<Vec<()>>, RpcError> {
    match SUBSYSTEMS.iter().any(|known| known.subsystem == params.name) {
        true => Ok(None),
        false => Err(RpcError::InvalidParams("there is no such subsystem".into())),
    }
}

/// Waits until the program can be used, which it is as soon as the control socket answers.
pub(super) fn wait_init(_: &mut Context, _: NoParams) -> Result<bool, RpcError> {
    Ok(true)
}

/// Ends a state that the program is not in.
pub(super) fn start_init(_: &mut Context, _: NoParams) -> Result<bool, RpcError> {
    Err(RpcError::WrongState)
}

/// Ticks are nanoseconds.
const TICK_RATE: u64 = 1_000_000_000;

#[derive(Serialize)]
pub(super) struct Reactors {
    tick_rate: u64,
    pid: u32,
    reactors: Vec<Reactor>,
}

#[derive(Serialize)]
struct Reactor {
    /// Of a worker that is pinned to no CPU it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    lcore: Option<usize>,
    in_interrupt: bool,
    lw_threads: [ThreadInfo; 1],
}

#[derive(Serialize)]
struct ThreadInfo {
    name: String,
    id: usize,
    cpumask: String,
}

/// A worker, as SPDK tells of its threads.
fn thread(context: &Context, worker: usize) -> ThreadInfo {
    let cpu = context.registry.pool.placement().cpu_of(worker);
    ThreadInfo { name: format!("worker {worker}"), id: worker + 1, cpumask: cpu_mask(&[cpu]) }
}

/// The workers and the CPUs that they are pinned to. How busy they are is not measured, so SPDK's `busy` and `idle` are not there.
pub(super) fn reactors(context: &mut Context, _: NoParams) -> Result<Reactors, RpcError> {
    let pool = &context.registry.pool;
    let reactors = (0..pool.len()).map(|worker| Reactor {
        lcore: pool.placement().cpu_of(worker),
        in_interrupt: false,
        lw_threads: [thread(context, worker)],
    });
    Ok(Reactors { tick_rate: TICK_RATE, pid: std::process::id(), reactors: reactors.collect() })
}

#[derive(Serialize)]
pub(super) struct Threads {
    tick_rate: u64,
    threads: Vec<ThreadInfo>,
}

/// The workers.
pub(super) fn threads(context: &mut Context, _: NoParams) -> Result<Threads, RpcError> {
    let threads = (0..context.registry.pool.len()).map(|worker| thread(context, worker)).collect();
    Ok(Threads { tick_rate: TICK_RATE, threads })
}

//! Faults while the program runs: one command per line on standard input, one answer per line on standard output.

use std::io::{self, BufRead, Write};
use std::sync::{Mutex, PoisonError};

use nvme_sim::{Error, FaultRule, PowerLoss, Simulator};

/// The commands, for the help.
pub(crate) const COMMANDS: &str = "fault RULE, faults [RULE ...], fired, identify [CHANGE ...], registers [CHANGE ...], stop, go, remove, reinsert, power-cut [some]";

/// Answers commands until the input ends; every answer begins with "ok" or "error:".
pub(crate) fn serve(
    simulator: &Mutex<Option<Simulator>>,
    input: impl BufRead,
    mut output: impl Write,
) -> io::Result<()> {
    for line in input.lines() {
        let line = line?;
        let simulator = simulator.lock().unwrap_or_else(PoisonError::into_inner);
        // `None`: the program ends.
        let Some(simulator) = simulator.as_ref() else { return Ok(()) };
        match answer(simulator, line.trim()) {
            Ok(value) => writeln!(output, "ok{value}")?,
            Err(why) => writeln!(output, "error: {why}")?,
        }
        output.flush()?;
    }
    Ok(())
}

fn answer(simulator: &Simulator, line: &str) -> Result<String, String> {
    let rule = |text: &str| text.parse::<FaultRule>().map_err(|error| error.to_string());
    let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
    let faults = simulator.faults();
    match command {
        "fault" => faults.add(rule(rest)?),
        // Rules that have hit as often as they may are still looked at for every command, so a long run replaces them.
        "faults" => {
            let rules = rest.split_whitespace().map(rule).collect::<Result<_, _>>()?;
            let mut plan = faults.plan();
            plan.rules = rules;
            faults.set(plan);
        }
        "identify" | "registers" => {
            let changes = rest.split_whitespace();
            match command {
                "identify" => {
                    changes.map(str::parse).collect::<Result<_, _>>().and_then(|all| simulator.patch_identify(all))
                }
                _ => changes.map(str::parse).collect::<Result<_, _>>().and_then(|all| simulator.patch_registers(all)),
            }
            .map_err(|error: Error| error.to_string())?;
        }
        "fired" => return Ok(format!(" {}", faults.fired())),
        "stop" | "go" => faults.change(|plan| plan.stopped = command == "stop"),
        "remove" => simulator.remove(),
        "reinsert" => simulator.reinsert().map_err(|error| error.to_string())?,
        "power-cut" => {
            let loss = match rest {
                "" => PowerLoss::All,
                "some" => PowerLoss::Some,
                _ => return Err(format!("{rest:?}: power-cut, or power-cut some")),
            };
            let lost = simulator.power_cut_losing(loss).map_err(|error| error.to_string())?;
            return Ok(format!(" {lost}"));
        }
        _ => return Err(format!("{command:?} is not one of: {COMMANDS}")),
    }
    Ok(String::new())
}

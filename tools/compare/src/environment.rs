//! What the host says of itself.

use std::fs;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a program may take to say its version.
const VERSION_LIMIT: Duration = Duration::from_secs(20);

/// A machine that has more to do than this, per CPU, is not fit for measuring.
const BUSY: f64 = 0.75;

/// The processor's model name.
pub fn cpu_model() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    line.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

/// The kernel's release.
pub fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("Linux {}", release.trim())
}

/// Programs that ran, or waited for a CPU, over the last minute (proc_loadavg(5)).
fn load_average() -> Option<f64> {
    fs::read_to_string("/proc/loadavg").ok()?.split(' ').next()?.parse().ok()
}

/// A note for the report if the machine has other work now, before the comparison begins.
pub fn busy_note() -> Option<String> {
    let load = load_average()?;
    let cpus = std::thread::available_parallelism().map_or(1.0, |cpus| usize::from(cpus) as f64);
    (load > BUSY * cpus).then(|| {
        format!(
            "The machine was busy with other work when this began (load average {load:.1}): do not quote these figures, measure \
             again when it is quiet."
        )
    })
}

/// The first line of what `program --version` prints.
pub fn version(program: &Path) -> String {
    let text = version_text(program).unwrap_or_default();
    text.lines().next().map_or_else(|| "version unknown".to_owned(), |line| line.trim().to_owned())
}

/// What it prints, into a file: a pipe might be held open by what it has started.
fn version_text(program: &Path) -> io::Result<String> {
    let mut output = tempfile::tempfile()?;
    let mut command = Command::new(program);
    let mut child = command.arg("--version").stdin(Stdio::null()).stdout(output.try_clone()?).spawn()?;
    let deadline = Instant::now() + VERSION_LIMIT;
    while child.try_wait()?.is_none() {
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let mut text = Vec::new();
    output.rewind()?;
    output.read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// Now, in UTC: `2026-01-31 12:00`.
pub fn date() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    date_of(seconds)
}

/// Days are counted in years that begin in March, so that the leap day is the last one.
fn date_of(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    // Days since the first of March of the year 0: 719468 of them before 1970.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (of_month, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{of_month:02} {:02}:{:02}", rest / 3600, rest % 3600 / 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, date) in [
            (0, "1970-01-01 00:00"),
            (951_782_399, "2000-02-28 23:59"),
            (951_782_400, "2000-02-29 00:00"),
            (1_709_251_200, "2024-03-01 00:00"),
            (1_735_689_599, "2024-12-31 23:59"),
            (4_107_542_400, "2100-03-01 00:00"),
        ] {
            assert_eq!(date_of(seconds), date);
        }
    }

    #[test]
    fn the_host_says_something() {
        assert!(load_average().is_some_and(|load| load >= 0.0));
        assert!(!cpu_model().is_empty());
        assert!(kernel().len() > "Linux ".len());
        assert_eq!(version(Path::new("/no/such/program")), "version unknown");
    }
}

//! fio, which makes the load inside the guest: its arguments for a job, and what it says of it.

use serde::Deserialize;

use crate::comparison::Sample;
use crate::job::Job;

/// Loads before a measurement begins: caches and queues are then as they will be.
pub(super) const RAMP_SECONDS: f64 = 1.0;

/// The guest's name of disk number `disk`.
pub(super) fn disk_path(disk: usize) -> String {
    let letter = char::from(b'a' + u8::try_from(disk).expect("fewer disks than letters"));
    format!("/dev/vd{letter}")
}

/// A job in a guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load<'a> {
    /// What to do.
    pub job: &'a Job,
    /// Virtqueues of each disk.
    pub queues: u32,
    /// CPUs of the guest.
    pub vcpus: u32,
    /// Size of each disk.
    pub disk_bytes: u64,
    /// Length of the measurement.
    pub seconds: f64,
    /// Length of the load before it.
    pub ramp: f64,
}

impl Load<'_> {
    /// The arguments of fio.
    ///
    /// Each queue has a process of its own: the depth and the rate are shared out among them, and sequential ones begin at
    /// different places.
    pub(super) fn arguments(&self) -> Vec<String> {
        let Load { job, queues, seconds, ramp, .. } = *self;
        let lanes = lanes(job, queues);
        let mut arguments = vec![
            "--output-format=json".to_owned(),
            "--ioengine=libaio".to_owned(),
            "--direct=1".to_owned(),
            format!("--rw={}", job.pattern.fio()),
            format!("--bs={}", job.block_bytes),
            "--norandommap".to_owned(),
            // Both sides get the same requests.
            "--randrepeat=1".to_owned(),
            "--time_based".to_owned(),
            format!("--runtime={}ms", (seconds * 1000.0).round()),
            format!("--ramp_time={}ms", (ramp * 1000.0).round()),
            // The whole time from a request's submission to its end, as an application sees it.
            "--clat_percentiles=0".to_owned(),
            "--lat_percentiles=1".to_owned(),
            "--percentile_list=50:99:99.9".to_owned(),
            "--group_reporting".to_owned(),
        ];
        if job.rate.is_some() {
            arguments.push("--rate_process=poisson".to_owned());
        }
        // What follows a section's name holds for that section only.
        for disk in 0..job.disks {
            for lane in 0..lanes {
                arguments.extend(self.section(disk, lane, lanes));
            }
        }
        arguments
    }

    fn section(&self, disk: u32, lane: u32, lanes: u32) -> Vec<String> {
        let Load { job, vcpus, disk_bytes, .. } = *self;
        let mut section = vec![
            format!("--name=disk{disk}-{lane}"),
            format!("--filename={}", disk_path(disk as usize)),
            format!("--iodepth={}", share(job.depth, lanes, lane)),
        ];
        if lanes > 1 {
            // A queue belongs to CPUs: its process stays on one of them.
            section.push(format!("--cpus_allowed={}", lane * vcpus / lanes));
        }
        if job.pattern.is_sequential() {
            let start = disk_bytes / u64::from(lanes) * u64::from(lane);
            section.push(format!("--offset={}", start - start % job.block_bytes));
        }
        if let Some(rate) = job.rate {
            section.push(format!("--rate_iops={}", share(rate, job.disks * lanes, disk * lanes + lane).max(1)));
        }
        section
    }
}

/// How many of a disk's queues a job uses: not more than it has requests in flight.
fn lanes(job: &Job, queues: u32) -> u32 {
    queues.min(job.depth).max(1)
}

/// The part of `whole` that number `index` of `count` gets; the first get what is over.
fn share(whole: u32, count: u32, index: u32) -> u32 {
    whole / count + u32::from(index < whole % count)
}

/// The command as the guest's shell takes it; standard error is kept apart from the JSON.
pub(super) fn script(arguments: &[String]) -> String {
    let quoted: Vec<String> = arguments.iter().map(|word| format!("'{word}'")).collect();
    format!("fio {} 2>/tmp/fio.err || {{ status=$?; cat /tmp/fio.err; exit $status; }}", quoted.join(" "))
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<ReportedJob>,
}

#[derive(Deserialize)]
struct ReportedJob {
    error: i64,
    #[serde(default)]
    total_err: u64,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    io_bytes: u64,
    iops: f64,
    bw_bytes: u64,
    /// Milliseconds.
    runtime: u64,
    total_ios: u64,
    lat_ns: Latency,
}

#[derive(Deserialize)]
struct Latency {
    mean: f64,
    #[serde(default)]
    percentile: Option<Percentiles>,
}

#[derive(Deserialize)]
struct Percentiles {
    #[serde(rename = "50.000000")]
    p50: f64,
    #[serde(rename = "99.000000")]
    p99: f64,
    #[serde(rename = "99.900000")]
    p999: f64,
}

/// Reads fio's JSON, which warnings may precede; CPU times are the caller's to add.
///
/// # Errors
/// If it is not fio's, if the job failed, or if nothing was read or written.
pub(super) fn parse(text: &str, job: &Job) -> Result<Sample, String> {
    let tail = |text: &str| text.chars().take(300).collect::<String>();
    let start = text.find('{').ok_or_else(|| format!("fio said nothing that is JSON: {}", tail(text)))?;
    let report: Report = serde_json::from_str(&text[start..])
        .map_err(|error| format!("fio's JSON is not understood ({error}): {}", tail(&text[start..])))?;
    let [group] = &report.jobs[..] else {
        return Err(format!("fio reported {} groups of jobs instead of one", report.jobs.len()));
    };
    if group.error != 0 {
        return Err(format!("fio's job ended with error {}", group.error));
    }
    let direction = if job.pattern.writes() { &group.write } else { &group.read };
    let percentiles = match &direction.lat_ns.percentile {
        Some(percentiles) if direction.total_ios > 0 && direction.runtime > 0 && direction.io_bytes > 0 => percentiles,
        _ => return Err("fio completed no request".to_owned()),
    };
    Ok(Sample {
        seconds: direction.runtime as f64 / 1000.0,
        operations: direction.total_ios,
        errors: group.total_err,
        iops: direction.iops,
        mib_per_s: direction.bw_bytes as f64 / f64::from(1 << 20),
        mean_us: direction.lat_ns.mean / 1000.0,
        p50_us: percentiles.p50 / 1000.0,
        p99_us: percentiles.p99 / 1000.0,
        p999_us: percentiles.p999 / 1000.0,
        ..Sample::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::Pattern;

    /// What fio 3.33 said of two seconds of random writes in a guest, with two sections in one group.
    const SAMPLE: &str = include_str!("../../tests/data/fio-3.33-randwrite.json");

    fn job(pattern: Pattern, block_bytes: u64, depth: u32, rate: Option<u32>, disks: u32) -> Job {
        Job::new(pattern, block_bytes, depth, rate, disks)
    }

    fn load(job: &Job, queues: u32, vcpus: u32) -> Vec<String> {
        Load { job, queues, vcpus, disk_bytes: 100 << 20, seconds: 1.5, ramp: 0.5 }.arguments()
    }

    fn values<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
        let prefix = format!("--{option}=");
        arguments.iter().filter_map(|argument| argument.strip_prefix(&prefix)).collect()
    }

    #[test]
    fn the_figures_of_a_real_run() {
        let sample = parse(SAMPLE, &job(Pattern::RandomWrite, 4096, 32, None, 1)).unwrap();
        assert_eq!((sample.operations, sample.errors), (3617, 0));
        assert_eq!((sample.seconds, sample.iops), (1.504, 2404.920213));
        assert_eq!((sample.p50_us, sample.p99_us, sample.p999_us), (12255.232, 35913.728, 44302.336));
        assert!((sample.mib_per_s - 9937702.0 / 1048576.0).abs() < 1e-9);
        assert!((sample.mean_us - 13299.337874966).abs() < 1e-9);
        // A warning may stand before it.
        assert_eq!(
            parse(&format!("fio: a warning\n{SAMPLE}"), &job(Pattern::RandomWrite, 4096, 32, None, 1)),
            Ok(sample)
        );
    }

    #[test]
    fn what_is_no_result_is_not_taken_for_one() {
        let write = job(Pattern::RandomWrite, 4096, 32, None, 1);
        let failure = |text: &str, job: &Job| parse(text, job).unwrap_err();
        // The sample has no reads.
        assert_eq!(failure(SAMPLE, &job(Pattern::RandomRead, 4096, 32, None, 1)), "fio completed no request");
        let error = failure(&SAMPLE.replace("\"error\":0", "\"error\":5"), &write);
        assert_eq!(error, "fio's job ended with error 5");
        assert!(failure("fio: no such engine", &write).contains("no such engine"));
        assert!(failure("{\"jobs\":[]}", &write).contains("0 groups"));
        assert!(failure(&SAMPLE[..200], &write).contains("not understood"));
        assert!(failure(&SAMPLE.replace("99.900000", "99.9"), &write).contains("99.900000"), "a percentile is missing");
    }

    #[test]
    fn the_depth_is_shared_out_among_the_queues() {
        let arguments = load(&job(Pattern::RandomRead, 4096, 256, None, 1), 3, 6);
        assert_eq!(values(&arguments, "iodepth"), ["86", "85", "85"]);
        assert_eq!(values(&arguments, "filename"), ["/dev/vda"; 3]);
        assert_eq!(values(&arguments, "cpus_allowed"), ["0", "2", "4"]);
        assert_eq!((values(&arguments, "rw"), values(&arguments, "bs")), (vec!["randread"], vec!["4096"]));
        assert_eq!((values(&arguments, "runtime"), values(&arguments, "ramp_time")), (vec!["1500ms"], vec!["500ms"]));
        // One request in flight uses one queue, and the guest's scheduler decides where.
        let arguments = load(&job(Pattern::RandomRead, 4096, 1, None, 1), 3, 6);
        assert_eq!(values(&arguments, "iodepth"), ["1"]);
        assert!(values(&arguments, "cpus_allowed").is_empty());
    }

    #[test]
    fn each_of_several_disks_has_the_whole_depth_and_its_share_of_the_rate() {
        let arguments = load(&job(Pattern::RandomWrite, 4096, 32, Some(1000), 3), 1, 2);
        assert_eq!(values(&arguments, "filename"), ["/dev/vda", "/dev/vdb", "/dev/vdc"]);
        assert_eq!(values(&arguments, "iodepth"), ["32"; 3]);
        assert_eq!(values(&arguments, "rate_iops"), ["334", "333", "333"]);
        assert_eq!(values(&arguments, "rate_process"), ["poisson"]);
        // Options of all sections come before the first one.
        let place = |wanted: &str| arguments.iter().position(|argument| argument.starts_with(wanted)).unwrap();
        assert!(place("--rate_process") < place("--name") && place("--group_reporting") < place("--name"));
    }

    #[test]
    fn sequential_loads_begin_at_different_whole_blocks() {
        let arguments = load(&job(Pattern::SequentialRead, 3 << 20, 8, None, 1), 2, 2);
        assert_eq!(values(&arguments, "offset"), ["0", &(48 << 20).to_string()]);
        assert!(values(&load(&job(Pattern::RandomRead, 4096, 8, None, 1), 2, 2), "offset").is_empty());
    }
}

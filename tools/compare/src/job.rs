//! What is measured: the jobs, and how the command line selects them.

use serde::{Deserialize, Serialize};

/// What the requests of a job do, and in which order they go over the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// Reads all over the disk.
    RandomRead,
    /// Writes all over the disk.
    RandomWrite,
    /// Reads one after the other.
    SequentialRead,
    /// Writes one after the other.
    SequentialWrite,
}

impl Pattern {
    /// True if the job destroys what is on the disk.
    pub fn writes(self) -> bool {
        matches!(self, Pattern::RandomWrite | Pattern::SequentialWrite)
    }

    /// True if the requests go over the disk in order.
    pub fn is_sequential(self) -> bool {
        matches!(self, Pattern::SequentialRead | Pattern::SequentialWrite)
    }

    /// fio's word for it (its option `rw`).
    pub fn fio(self) -> &'static str {
        match self {
            Pattern::RandomRead => "randread",
            Pattern::RandomWrite => "randwrite",
            Pattern::SequentialRead => "read",
            Pattern::SequentialWrite => "write",
        }
    }

    fn words(self) -> &'static str {
        match self {
            Pattern::RandomRead => "random read",
            Pattern::RandomWrite => "random write",
            Pattern::SequentialRead => "sequential read",
            Pattern::SequentialWrite => "sequential write",
        }
    }
}

/// Which figure of a job the comparison is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// Requests per second: more is better.
    Iops,
    /// Mebibytes per second: more is better.
    Throughput,
    /// Median latency: less is better.
    Latency,
}

/// One load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// What `--job` selects it by; made of the other fields by [`Job::new`].
    pub name: String,
    /// What the requests do.
    pub pattern: Pattern,
    /// Bytes per request.
    pub block_bytes: u64,
    /// Requests in flight on each disk, over all of its queues; with a `rate`, at most.
    pub depth: u32,
    /// Requests per second to start, over all disks, whether earlier ones have completed or not (an open loop: latency
    /// counts from the moment at which a request was to start). `None`: as many as go at this depth.
    pub rate: Option<u32>,
    /// Disks that are loaded at the same time.
    pub disks: u32,
}

impl Job {
    /// A job with its name, such as `randread-4k-q32`, `randread-4k-q256-x7` (seven disks) or
    /// `randread-4k-q128-10000iops` (a fixed rate).
    pub fn new(pattern: Pattern, block_bytes: u64, depth: u32, rate: Option<u32>, disks: u32) -> Job {
        let mut name = format!("{}-{}-q{depth}", pattern.fio(), short_size(block_bytes));
        if disks > 1 {
            name += &format!("-x{disks}");
        }
        if let Some(rate) = rate {
            name += &format!("-{rate}iops");
        }
        Job { name, pattern, block_bytes, depth, rate, disks }
    }

    /// The job in words, for a report.
    pub fn title(&self) -> String {
        let mut title = format!("{} {}, ", size_words(self.block_bytes), self.pattern.words());
        title += &match self.rate {
            Some(rate) => format!("{rate} per second"),
            None => format!("depth {}", self.depth),
        };
        if self.disks > 1 {
            title += &format!(", {} disks", self.disks);
        }
        title
    }

    /// The figure that the job is there for.
    pub fn figure(&self) -> Figure {
        match self {
            Job { rate: Some(_), .. } | Job { depth: 1, disks: 1, .. } => Figure::Latency,
            Job { block_bytes, .. } if *block_bytes >= 1 << 20 => Figure::Throughput,
            _ => Figure::Iops,
        }
    }
}

/// The jobs that run unless others are asked for: those of the field test this comparison began with (4 KiB random write at
/// depth 32, 4 KiB random read at depth 256, both also on `disks` disks), 1 MiB sequential, latency at depth 1, and
/// latency at 10000 requests per second.
pub fn default_jobs(disks: u32) -> Vec<Job> {
    use Pattern::{RandomRead, RandomWrite, SequentialRead, SequentialWrite};
    let mut jobs = vec![
        Job::new(RandomWrite, 4096, 32, None, 1),
        Job::new(RandomRead, 4096, 256, None, 1),
        Job::new(SequentialRead, 1 << 20, 8, None, 1),
        Job::new(SequentialWrite, 1 << 20, 8, None, 1),
        Job::new(RandomRead, 4096, 1, None, 1),
        Job::new(RandomRead, 4096, 128, Some(10_000), 1),
    ];
    if disks > 1 {
        jobs.push(Job::new(RandomWrite, 4096, 32, None, disks));
        jobs.push(Job::new(RandomRead, 4096, 256, None, disks));
    }
    jobs
}

/// The jobs of `all` called `names` (all of them without any), each repeated for every block size and every depth that was
/// asked for. Sizes or depths without names mean random reads and random writes on one disk.
///
/// # Errors
/// When there is no job of a name; the message lists those that there are.
pub fn select(all: &[Job], names: &[String], sizes: &[u64], depths: &[u32]) -> Result<Vec<Job>, String> {
    let chosen: Vec<Job> = match names {
        [] if sizes.is_empty() && depths.is_empty() => all.to_vec(),
        [] => [Pattern::RandomRead, Pattern::RandomWrite].map(|pattern| Job::new(pattern, 4096, 32, None, 1)).into(),
        names => {
            let find = |name: &String| {
                all.iter().find(|job| job.name == *name).cloned().ok_or_else(|| {
                    let known: Vec<&str> = all.iter().map(|job| job.name.as_str()).collect();
                    format!("there is no job {name}; there are: {}", known.join(", "))
                })
            };
            names.iter().map(find).collect::<Result<_, _>>()?
        }
    };
    let mut jobs: Vec<Job> = Vec::new();
    for job in chosen {
        let own_size = [job.block_bytes];
        let own_depth = [job.depth];
        for &size in if sizes.is_empty() { &own_size } else { sizes } {
            for &depth in if depths.is_empty() { &own_depth } else { depths } {
                let job = Job::new(job.pattern, size, depth, job.rate, job.disks);
                if !jobs.contains(&job) {
                    jobs.push(job);
                }
            }
        }
    }
    Ok(jobs)
}

/// A number of bytes as in a job's name: `4k`, `1m`, `512`.
fn short_size(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{}m", bytes >> 20),
        _ if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => format!("{}k", bytes >> 10),
        _ => bytes.to_string(),
    }
}

/// A number of bytes for people: `4 KiB`, `1 MiB`, `512 B`.
pub fn size_words(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) => format!("{} GiB", bytes >> 30),
        _ if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(jobs: &[Job]) -> Vec<&str> {
        jobs.iter().map(|job| job.name.as_str()).collect()
    }

    #[test]
    fn the_default_set_is_the_field_test_and_what_it_left_out() {
        let expected = [
            "randwrite-4k-q32",
            "randread-4k-q256",
            "read-1m-q8",
            "write-1m-q8",
            "randread-4k-q1",
            "randread-4k-q128-10000iops",
            "randwrite-4k-q32-x7",
            "randread-4k-q256-x7",
        ];
        assert_eq!(names(&default_jobs(7)), expected);
        assert_eq!(names(&default_jobs(1)), expected[..6]);
        assert_eq!(select(&default_jobs(7), &[], &[], &[]).unwrap(), default_jobs(7));
    }

    #[test]
    fn titles_and_figures() {
        let jobs = default_jobs(7);
        let find = |name: &str| jobs.iter().find(|job| job.name == name).unwrap();
        assert_eq!(find("randread-4k-q256-x7").title(), "4 KiB random read, depth 256, 7 disks");
        assert_eq!(find("randread-4k-q128-10000iops").title(), "4 KiB random read, 10000 per second");
        assert_eq!(find("write-1m-q8").title(), "1 MiB sequential write, depth 8");
        assert_eq!(find("write-1m-q8").figure(), Figure::Throughput);
        assert_eq!(find("randread-4k-q1").figure(), Figure::Latency);
        assert_eq!(find("randread-4k-q128-10000iops").figure(), Figure::Latency);
        assert_eq!(find("randread-4k-q256").figure(), Figure::Iops);
    }

    #[test]
    fn sizes_and_depths_multiply_what_was_chosen() {
        let all = default_jobs(7);
        let matrix = select(&all, &["randread-4k-q1".into()], &[512, 16 << 10, 128 << 10], &[1, 4, 32, 128]).unwrap();
        assert_eq!(matrix.len(), 12);
        assert_eq!(
            names(&matrix)[..5],
            ["randread-512-q1", "randread-512-q4", "randread-512-q32", "randread-512-q128", "randread-16k-q1"]
        );
        let both = select(&all, &[], &[512], &[]).unwrap();
        assert_eq!(names(&both), ["randread-512-q32", "randwrite-512-q32"]);
        // Two jobs that become the same one are measured once.
        let once = select(&all, &["randread-4k-q1".into(), "randread-4k-q256".into()], &[], &[8]).unwrap();
        assert_eq!(names(&once), ["randread-4k-q8"]);
    }

    #[test]
    fn an_unknown_job_is_told_with_those_there_are() {
        let error = select(&default_jobs(1), &["fast".into()], &[], &[]).unwrap_err();
        assert!(error.starts_with("there is no job fast; there are: randwrite-4k-q32, "), "{error}");
    }
}

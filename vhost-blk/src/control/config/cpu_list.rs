//! A list of CPUs, as options and the configuration file write it.

use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;

/// A list of CPUs such as `2,4-7`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct CpuList(pub Vec<usize>);

/// Linux's own limit on CPU numbers (CONFIG_NR_CPUS on the biggest kernels).
const MAX_CPU: usize = 8191;

/// A text is no list of CPUs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("CPU list \"{text}\": {fault}; use numbers and ranges such as 2,4-7")]
pub struct CpuListError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    #[source]
    pub fault: CpuListFault,
}

/// What can be wrong with a list of CPUs.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CpuListFault {
    /// A part of it is no number, or greater than any CPU's.
    #[error("\"{0}\" is not a CPU number")]
    NoNumber(String),
    /// A range ends before it begins.
    #[error("the range {0} runs backwards")]
    Backwards(String),
    /// A CPU would have two workers.
    #[error("CPU {0} is listed twice")]
    Twice(usize),
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let wrong = |fault| CpuListError { text: text.to_owned(), fault };
        let number = |part: &str| match part.parse::<usize>() {
            Ok(cpu) if cpu <= MAX_CPU && part.bytes().all(|byte| byte.is_ascii_digit()) => Ok(cpu),
            _ => Err(wrong(CpuListFault::NoNumber(part.to_owned()))),
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((first, last)) => (number(first)?, number(last)?),
                None => (number(part)?, number(part)?),
            };
            if first > last {
                return Err(wrong(CpuListFault::Backwards(part.to_owned())));
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(wrong(CpuListFault::Twice(cpu)));
                }
                cpus.push(cpu);
            }
        }
        Ok(CpuList(cpus))
    }
}

impl TryFrom<String> for CpuList {
    type Error = CpuListError;

    fn try_from(text: String) -> Result<Self, CpuListError> {
        text.parse()
    }
}

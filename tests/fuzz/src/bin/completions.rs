//! Runs `fuzz::completions` under libFuzzer, see tests/fuzz.sh.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::completions::run(data));

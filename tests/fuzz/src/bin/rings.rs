//! Runs `fuzz::rings` under libFuzzer, see tests/fuzz.sh.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::rings::run(data));

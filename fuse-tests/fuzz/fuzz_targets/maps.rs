#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuse_tests::targets::maps(data));

//! See [`tideshift_fuzz::policy`].

#![no_main]
#![allow(unsafe_code, reason = "the macro exports libFuzzer's entry point")]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tideshift_fuzz::policy::holds_for(data));

//! See [`tideshift_fuzz::choice`].

#![no_main]
#![allow(unsafe_code, reason = "the macro exports libFuzzer's entry point")]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tideshift_fuzz::choice::holds_for(data));

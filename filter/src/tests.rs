//! Whole stories, native and without a wasm runtime: the filter's logic in a proxy that lives in memory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod hostile;
mod imports;
mod leases;
mod policies;
mod proxy;
mod requests;
mod vetoes;

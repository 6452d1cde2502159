//! The controller of Tideshift: what the one binary `tideshift` does, as a library.

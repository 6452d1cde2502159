//! The module in a small interpreter.

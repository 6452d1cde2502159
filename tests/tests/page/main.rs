//! The web page in Chromium.

mod chromium;

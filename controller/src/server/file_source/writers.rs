//! Finds processes that have a file open for writing. Linux shows only processes that this one may inspect: those of
//! the same user, or all for root.

/// The id of a process that has this device and inode open for writing; `None` if none is known.
#[cfg(target_os = "linux")]
pub(super) fn of(file: (u64, u64)) -> Option<u32> {
    use std::os::unix::fs::MetadataExt as _;
    let names = |path: &str| {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).collect::<Vec<_>>()
    };
    names("/proc").into_iter().find(|pid| {
        names(&format!("/proc/{pid}/fd")).into_iter().any(|descriptor| {
            let is_it = std::fs::metadata(format!("/proc/{pid}/fd/{descriptor}"))
                .is_ok_and(|data| (data.dev(), data.ino()) == file);
            is_it
                && is_for_writing(
                    &std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{descriptor}")).unwrap_or_default(),
                )
        })
    })
}

#[cfg(not(target_os = "linux"))]
pub(super) fn of(_: (u64, u64)) -> Option<u32> {
    None
}

/// Whether the text of a `fdinfo` describes a descriptor open for writing: its flags are octal, and the lowest two bits
/// are the access mode.
#[cfg(target_os = "linux")]
fn is_for_writing(text: &str) -> bool {
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok()).is_some_and(|flags| flags & 0b11 != 0)
}

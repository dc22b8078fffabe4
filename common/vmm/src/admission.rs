//! Whether this host can give a guest its memory, asked before the guest is made.
//!
//! Guest memory is not reserved, so a guest that is too large would start all the same and lose its node in
//! the middle of its life (see [`sigbus`](crate::sigbus), or the OOM killer). So the size is held against
//! whatever may stop the memory from being given: the host's free memory, the memory limits of the cgroups
//! (v1 and v2) that this process is in, up to the root that it can see, and its limit on address space.
//!
//! A source that is absent or that makes no sense does not count, and says so in the log: a host with an odd
//! /proc must not keep guests from running.

use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::spec::GuestSpec;

/// Bytes asked for beside guest memory, for the VMM itself: the dirty rings of 64 vCPUs (1 MiB each), the
/// held output of an epoch (17 MiB), stacks, the machine state, and room.
pub const VMM_ROOM: u64 = 128 << 20;

/// cgroup v1 writes "no limit" as the largest multiple of the page size in an i64; whatever is above this is
/// no limit of any machine.
const UNLIMITED: u64 = 1 << 62;

/// What can be too small for a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Limit {
    /// The memory that the host has available.
    HostMemory,
    /// The memory limit in this file of a cgroup.
    Cgroup(PathBuf),
    /// The limit on address space of this process.
    AddressSpace,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::HostMemory => write!(f, "host memory"),
            Self::Cgroup(file) => write!(f, "the memory limit {}", file.display()),
            Self::AddressSpace => write!(f, "the address space limit (ulimit -v)"),
        }
    }
}

impl Limit {
    fn remedy(&self) -> &'static str {
        match self {
            Self::HostMemory => "lower the guest's memory, free memory on this host, or allow overcommit",
            Self::Cgroup(_) => "lower the guest's memory, raise that limit, or allow overcommit",
            Self::AddressSpace => "lower the guest's memory or raise that limit",
        }
    }
}

/// A guest that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a guest of {} does not fit: with {} for the VMM it needs {}, and {limit} leaves {}; {}",
    size(*.guest_bytes), size(VMM_ROOM), size(.guest_bytes.saturating_add(VMM_ROOM)), size(*.available_bytes),
    limit.remedy())]
pub struct AdmissionError {
    /// The guest's memory in bytes.
    pub guest_bytes: u64,
    /// What is left below the smallest limit, in bytes.
    pub available_bytes: u64,
    /// The smallest limit.
    pub limit: Limit,
}

/// Checks that this host can give the guest its memory and [`VMM_ROOM`] beside it. With
/// [`overcommit`](GuestSpec::overcommit) only the address space counts.
///
/// # Errors
/// Something leaves less than that; the error names the smallest.
pub fn check(spec: &GuestSpec) -> Result<(), AdmissionError> {
    check_under(Path::new("/"), spec)
}

/// [`check`] for the host whose files lie under `root`.
///
/// # Errors
/// As [`check`].
pub fn check_under(root: &Path, spec: &GuestSpec) -> Result<(), AdmissionError> {
    let mut survey = Survey::new(root);
    survey.address_space();
    if !spec.overcommit {
        survey.host_memory();
        survey.cgroups();
    }
    for reason in &survey.ignored {
        tracing::warn!("memory admission: {reason}: ignored");
    }
    let Some((limit, available_bytes)) = survey.smallest() else { return Ok(()) };
    if spec.memory_bytes.saturating_add(VMM_ROOM) <= available_bytes {
        return Ok(());
    }
    Err(AdmissionError { guest_bytes: spec.memory_bytes, available_bytes, limit })
}

/// What the files of a host say.
struct Survey<'a> {
    root: &'a Path,
    /// Limits that exist, with the bytes that are left below them.
    found: Vec<(Limit, u64)>,
    /// Why something does not count.
    ignored: Vec<String>,
}

impl<'a> Survey<'a> {
    fn new(root: &'a Path) -> Self {
        Self { root, found: Vec::new(), ignored: Vec::new() }
    }

    fn smallest(&self) -> Option<(Limit, u64)> {
        self.found.iter().min_by_key(|(_, available)| *available).cloned()
    }

    fn host_memory(&mut self) {
        let Some(text) = self.read("/proc/meminfo") else { return };
        match kib_field(&text, "MemAvailable") {
            Some(bytes) => self.found.push((Limit::HostMemory, bytes)),
            None => self.ignored.push("/proc/meminfo has no MemAvailable in kB".to_owned()),
        }
    }

    fn address_space(&mut self) {
        let Some(limits) = self.read("/proc/self/limits") else { return };
        match address_space_limit(&limits) {
            Some(Bytes::Limit(limit)) => {
                let used = self.read("/proc/self/status").and_then(|text| kib_field(&text, "VmSize"));
                self.found.push((Limit::AddressSpace, limit.saturating_sub(used.unwrap_or(0))));
            }
            Some(Bytes::Unlimited) => (),
            None => self.ignored.push("/proc/self/limits has no limit on address space".to_owned()),
        }
    }

    /// Every cgroup from the process's own to the root of the mount, for each hierarchy that can limit memory.
    fn cgroups(&mut self) {
        let (Some(groups), Some(mounts)) =
            (self.read("/proc/self/cgroup"), self.read("/proc/self/mountinfo"))
        else {
            return;
        };
        let mounts: Vec<Mount> = mounts.lines().filter_map(Mount::parse).collect();
        for (version, path) in own_cgroups(&groups) {
            match place(&mounts, version, &path) {
                Some((top, below)) => {
                    let directory = top.join(below);
                    for directory in directory.ancestors().take_while(|d| d.starts_with(&top)) {
                        self.cgroup(version, directory);
                    }
                }
                // On a hybrid host the unified hierarchy is often not mounted, and without controllers anyway.
                None if version == Version::V2 && mounts.iter().any(|m| m.version == Version::V1) => (),
                None => self.ignored.push(format!("no mount shows the cgroup {}", path.display())),
            }
        }
    }

    fn cgroup(&mut self, version: Version, directory: &Path) {
        let (limit_file, usage_file, cache) = version.files();
        let file = directory.join(limit_file);
        // The root of a hierarchy has no such files, and neither has a group whose parent gives out no memory
        // controller.
        let Some(text) = self.read_optional(&file) else { return };
        let limit = match memory_limit(&text) {
            Some(Bytes::Limit(limit)) => limit,
            Some(Bytes::Unlimited) => return,
            None => return self.ignored.push(format!("{} is not a number of bytes", file.display())),
        };
        let usage = self.read_optional(&directory.join(usage_file));
        let Some(usage) = usage.and_then(|text| text.trim().parse::<u64>().ok()) else {
            let directory = directory.display();
            return self.ignored.push(format!("{directory}/{usage_file} is not a number of bytes"));
        };
        // The group's file cache counts as used, but makes room under pressure.
        let stat = self.read_optional(&directory.join("memory.stat")).unwrap_or_default();
        let cached = cache.iter().filter_map(|name| stat_field(&stat, name)).fold(0, u64::saturating_add);
        self.found.push((Limit::Cgroup(file), limit.saturating_sub(usage.saturating_sub(cached))));
    }

    fn read(&mut self, path: &str) -> Option<String> {
        let text = self.read_optional(Path::new(path));
        if text.is_none() {
            self.ignored.push(format!("{path} cannot be read"));
        }
        text
    }

    /// Bytes that are no text are replaced: nothing of what is looked for has any.
    fn read_optional(&self, path: &Path) -> Option<String> {
        let bytes = fs::read(self.root.join(path.strip_prefix("/").unwrap_or(path))).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl Version {
    /// File of the limit, file of the usage, and the fields of memory.stat that count what can be given back.
    /// In v1 only those with "total" include the groups below, as the usage does.
    fn files(self) -> (&'static str, &'static str, [&'static str; 2]) {
        match self {
            Self::V1 => {
                let cache = ["total_inactive_file", "total_active_file"];
                ("memory.limit_in_bytes", "memory.usage_in_bytes", cache)
            }
            Self::V2 => ("memory.max", "memory.current", ["inactive_file", "active_file"]),
        }
    }
}

/// A mounted hierarchy that may limit memory.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    /// The cgroup that is at the mount point.
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// Reads a line of mountinfo (proc(5)); nothing if it is of another kind.
    fn parse(line: &str) -> Option<Self> {
        let (front, back) = line.split_once(" - ")?;
        let mut front = front.split(' ').skip(3);
        let (root, point) = (unescape(front.next()?), unescape(front.next()?));
        let mut back = back.split(' ');
        let kind = back.next()?;
        let options = back.nth(1)?;
        let version = match kind {
            "cgroup" if options.split(',').any(|option| option == "memory") => Version::V1,
            "cgroup2" => Version::V2,
            _ => return None,
        };
        Some(Self { version, root: root.into(), point: point.into() })
    }
}

/// Spaces, tabs, newlines and backslashes are written as three octal digits in mountinfo.
fn unescape(text: &str) -> String {
    let mut pieces = text.split('\\');
    let mut out = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let code = piece.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(u8::is_ascii) {
            Some(code) => {
                out.push(char::from(code));
                out += &piece[3..];
            }
            None => {
                out.push('\\');
                out += piece;
            }
        }
    }
    out
}

/// The cgroups of the process that may limit its memory, from /proc/self/cgroup.
fn own_cgroups(text: &str) -> Vec<(Version, PathBuf)> {
    let group = |line: &str| {
        let mut fields = line.splitn(3, ':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let version = match (number, controllers) {
            ("0", "") => Version::V2,
            _ if controllers.split(',').any(|name| name == "memory") => Version::V1,
            _ => return None,
        };
        Some((version, PathBuf::from(path)))
    };
    text.lines().filter_map(group).collect()
}

/// Where the cgroup `path` is seen: a mount point, and the way from there. Of several mounts the one that shows
/// the most ancestors.
fn place(mounts: &[Mount], version: Version, path: &Path) -> Option<(PathBuf, PathBuf)> {
    let below = |mount: &Mount| {
        let below = path.strip_prefix(&mount.root).ok()?;
        // Outside the cgroup namespace's root, paths begin with "..": the mount does not show them.
        let shown = below.components().all(|part| matches!(part, Component::Normal(_)));
        shown.then(|| (mount.point.clone(), below.to_owned()))
    };
    let shown = mounts.iter().filter(|mount| mount.version == version).filter_map(below);
    shown.max_by_key(|(_, below)| below.components().count())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    Limit(u64),
    Unlimited,
}

/// The content of memory.max or memory.limit_in_bytes.
fn memory_limit(text: &str) -> Option<Bytes> {
    match text.trim() {
        "max" => Some(Bytes::Unlimited),
        number => {
            let bytes: u64 = number.parse().ok()?;
            Some(if bytes >= UNLIMITED { Bytes::Unlimited } else { Bytes::Limit(bytes) })
        }
    }
}

/// The soft limit on address space in /proc/self/limits.
fn address_space_limit(text: &str) -> Option<Bytes> {
    let line = text.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(Bytes::Unlimited),
        number => number.parse().ok().map(Bytes::Limit),
    }
}

/// A line `Name:   123 kB` of /proc/meminfo or /proc/self/status, in bytes.
fn kib_field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A line `name 123` of memory.stat.
fn stat_field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A number of bytes for people: three digits or so, in the largest unit that fits.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let place = ((bytes.ilog2() / 10) as usize).min(UNITS.len());
    let unit = 1_u64 << (10 * place);
    let name = UNITS[place - 1];
    if bytes.is_multiple_of(unit) {
        return format!("{} {name}", bytes / unit);
    }
    // Rounded down, so that what is left never looks like more than it is.
    let hundredths = u128::from(bytes) * 100 / u128::from(unit);
    format!("{}.{:02} {name}", hundredths / 100, hundredths % 100)
}

#[cfg(test)]
mod tests {
    use super::{
        AdmissionError, Bytes, Limit, Mount, Survey, VMM_ROOM, Version, address_space_limit, check,
        check_under, kib_field, memory_limit, own_cgroups, place, size, stat_field, unescape,
    };
    use crate::spec::{BootFile, BootSource, GuestSpec};
    use proptest::prelude::{any, prop_assert, proptest};
    use std::fs;
    use std::path::{Path, PathBuf};
    use vmm_sys_util::tempdir::TempDir;

    const MIB: u64 = 1 << 20;
    const FREE: &str = "MemTotal:       65536000 kB\nMemFree: 1 kB\nMemAvailable:   33554432 kB\n";
    const NO_LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
        Max address space         unlimited            unlimited            bytes     \n";
    const V1: &str = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
        36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices\n";
    const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";

    fn spec(bytes: u64) -> GuestSpec {
        let image = BootFile { path: PathBuf::new(), bytes: Vec::new().into() };
        GuestSpec::new("test", bytes, BootSource::Flat { image, address: 0 })
    }

    /// A directory with the given files in it, besides a host with 32 GiB free and no limits.
    fn host(files: &[(&str, &str)]) -> TempDir {
        let root = TempDir::new().unwrap();
        let usual = [
            ("proc/meminfo", FREE),
            ("proc/self/limits", NO_LIMITS),
            ("proc/self/status", "Name:\tcolo\nVmSize:\t  102400 kB\n"),
            ("proc/self/cgroup", ""),
            ("proc/self/mountinfo", ""),
        ];
        for (path, text) in usual.iter().chain(files) {
            let path = root.as_path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn refused(root: &TempDir, bytes: u64) -> AdmissionError {
        check_under(root.as_path(), &spec(bytes)).unwrap_err()
    }

    #[test]
    fn this_host_takes_a_small_guest_and_not_one_of_an_exbibyte() {
        check(&spec(MIB)).unwrap();
        assert!(check(&spec(1 << 60)).unwrap_err().available_bytes < 1 << 60);
    }

    #[test]
    fn host_memory_counts_unless_overcommit_is_allowed() {
        let root = host(&[]);
        let all = 32 << 30;
        check_under(root.as_path(), &spec(all - VMM_ROOM)).unwrap();
        let error = refused(&root, all - VMM_ROOM + 4096);
        assert_eq!((error.available_bytes, &error.limit), (all, &Limit::HostMemory));
        let mut sparse = spec(1 << 40);
        sparse.overcommit = true;
        check_under(root.as_path(), &sparse).unwrap();
        let text = refused(&root, 40 << 30).to_string();
        assert_eq!(
            text,
            "a guest of 40 GiB does not fit: with 128 MiB for the VMM it needs 40.12 GiB, and host memory leaves \
             32 GiB; lower the guest's memory, free memory on this host, or allow overcommit"
        );
    }

    #[test]
    fn the_address_space_counts_with_overcommit_too() {
        let limits = NO_LIMITS.replacen("unlimited ", "1073741824", 1);
        let root = host(&[("proc/self/limits", &limits)]);
        let mut sparse = spec(1 << 30);
        sparse.overcommit = true;
        let error = check_under(root.as_path(), &sparse).unwrap_err();
        assert_eq!((error.available_bytes, &error.limit), ((1024 - 100) * MIB, &Limit::AddressSpace));
        assert!(error.to_string().contains("the address space limit (ulimit -v) leaves 924 MiB; lower"));
        assert!(!error.to_string().contains("overcommit"));
        check_under(root.as_path(), &spec(100 * MIB)).unwrap();
    }

    #[test]
    fn v1_limits_count_less_what_is_used_but_not_the_cache() {
        let root = host(&[
            ("proc/self/cgroup", "4:memory:/a/b\n1:cpu:/\n0::/\n"),
            ("proc/self/mountinfo", V1),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "1073741824\n"),
            ("sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "314572800\n"),
            ("sys/fs/cgroup/memory/a/b/memory.stat", "inactive_file 9\ntotal_inactive_file 104857600\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "1\n"),
        ]);
        let error = refused(&root, 2 << 30);
        assert_eq!(error.available_bytes, (1024 - 300 + 100) * MIB);
        let file = "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes";
        assert_eq!(error.limit, Limit::Cgroup(file.into()));
        assert!(
            error.to_string().contains(&format!("the memory limit {file} leaves 824 MiB; lower the guest's"))
        );
        check_under(root.as_path(), &spec(600 * MIB)).unwrap();
    }

    #[test]
    fn the_smallest_of_nested_v2_limits_wins() {
        let root = host(&[
            ("proc/self/cgroup", "0::/colo.slice/vm.scope\n"),
            ("proc/self/mountinfo", V2),
            ("sys/fs/cgroup/colo.slice/vm.scope/memory.max", "max\n"),
            ("sys/fs/cgroup/colo.slice/vm.scope/memory.current", "0\n"),
            ("sys/fs/cgroup/colo.slice/memory.max", "2147483648\n"),
            ("sys/fs/cgroup/colo.slice/memory.current", "2147483648\n"),
            ("sys/fs/cgroup/colo.slice/memory.stat", "inactive_file 1048576\nactive_file 2097152\n"),
            ("sys/fs/cgroup/memory.max", "8589934592\n"),
            ("sys/fs/cgroup/memory.current", "1000\n"),
            // Above the mount: none of its business.
            ("sys/fs/memory.max", "1\n"),
            ("sys/fs/memory.current", "1\n"),
        ]);
        let error = refused(&root, MIB);
        assert_eq!(error.available_bytes, 3 * MIB);
        assert_eq!(error.limit, Limit::Cgroup("/sys/fs/cgroup/colo.slice/memory.max".into()));
    }

    #[test]
    fn a_hybrid_host_is_limited_by_whichever_hierarchy_has_the_controller() {
        let unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let root = host(&[
            ("proc/self/cgroup", "4:memory,hugetlb:/vm\n0::/user/vm\n"),
            ("proc/self/mountinfo", &(V1.to_owned() + unified)),
            ("sys/fs/cgroup/unified/user/vm/cgroup.procs", ""),
            ("sys/fs/cgroup/memory/vm/memory.limit_in_bytes", "20971520"),
            ("sys/fs/cgroup/memory/vm/memory.usage_in_bytes", "10485760"),
        ]);
        assert_eq!(refused(&root, MIB).available_bytes, 10 * MIB);
    }

    #[test]
    fn a_container_sees_its_own_cgroup_at_the_mount_point() {
        let bind = V1.replacen(" / ", " /docker/0a1b ", 1);
        let root = host(&[
            ("proc/self/cgroup", "4:memory:/docker/0a1b/inner\n"),
            ("proc/self/mountinfo", &bind),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4096"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "8192"),
        ]);
        let error = refused(&root, MIB);
        let file = PathBuf::from("/sys/fs/cgroup/memory/memory.limit_in_bytes");
        assert_eq!((error.available_bytes, error.limit), (0, Limit::Cgroup(file)));
    }

    #[test]
    fn what_makes_no_sense_is_ignored_with_a_reason() {
        let root = host(&[
            ("proc/meminfo", "MemAvailable: lots\n"),
            ("proc/self/limits", "Max address space   much\n"),
            ("proc/self/cgroup", "0::/a\n::::\n\n5:memory:/../x\n"),
            ("proc/self/mountinfo", &(V2.to_owned() + V1 + "nonsense\n1 2 3 - cgroup\n")),
            ("sys/fs/cgroup/a/memory.max", "-5\n"),
            ("sys/fs/cgroup/memory.max", "4096\n"),
            ("sys/fs/cgroup/memory.current", "\n"),
        ]);
        let mut survey = Survey::new(root.as_path());
        survey.host_memory();
        survey.address_space();
        survey.cgroups();
        assert_eq!(survey.found, []);
        let reasons = [
            "/proc/meminfo has no MemAvailable in kB",
            "/proc/self/limits has no limit on address space",
            "/sys/fs/cgroup/a/memory.max is not a number of bytes",
            "/sys/fs/cgroup/memory.current is not a number of bytes",
            "no mount shows the cgroup /../x",
        ];
        assert_eq!(survey.ignored, reasons);
        check_under(root.as_path(), &spec(1 << 40)).unwrap();
        check_under(&root.as_path().join("nothing here"), &spec(1 << 40)).unwrap();
    }

    #[test]
    fn limits_and_fields_are_read_in_every_form() {
        assert_eq!(memory_limit("max\n"), Some(Bytes::Unlimited));
        assert_eq!(memory_limit("9223372036854771712\n"), Some(Bytes::Unlimited));
        assert_eq!(memory_limit("18446744073709551615"), Some(Bytes::Unlimited));
        assert_eq!(memory_limit("0\n"), Some(Bytes::Limit(0)));
        assert_eq!(memory_limit("99999999999999999999"), None);
        assert_eq!(memory_limit(""), None);
        assert_eq!(address_space_limit(NO_LIMITS), Some(Bytes::Unlimited));
        assert_eq!(address_space_limit("Max address space"), None);
        assert_eq!(kib_field(FREE, "MemFree"), Some(1024));
        assert_eq!(kib_field(FREE, "Mem"), None);
        assert_eq!(kib_field("A: 18446744073709551615 kB", "A"), None);
        assert_eq!(stat_field("total_inactive_file 1\ninactive_file 2\n", "inactive_file"), Some(2));
    }

    #[test]
    fn cgroups_are_placed_below_the_mount_that_shows_most() {
        let mount =
            |root: &str, point: &str| Mount { version: Version::V2, root: root.into(), point: point.into() };
        let mounts = [mount("/a/b", "/narrow"), mount("/a", "/wide"), mount("/other", "/other")];
        let placed = |path: &str| place(&mounts, Version::V2, Path::new(path));
        assert_eq!(placed("/a/b/c"), Some(("/wide".into(), "b/c".into())));
        assert_eq!(placed("/ab"), None);
        assert_eq!(placed("/a/../x"), None);
        assert_eq!(place(&mounts, Version::V1, Path::new("/a")), None);
        let line = r"30 23 0:26 /x\040y /sys/fs/c\134g rw - cgroup2 none rw";
        assert_eq!(Mount::parse(line), Some(mount("/x y", r"/sys/fs/c\g")));
        assert_eq!(unescape(r"\9é\04"), r"\9é\04");
        assert_eq!(own_cgroups("0::/a:b\n3:cpu,memory:/c\n2:cpu:/d\n").len(), 2);
    }

    #[test]
    fn sizes_are_readable_and_never_rounded_up() {
        assert_eq!(size(0), "0 bytes");
        assert_eq!(size(1023), "1023 bytes");
        assert_eq!(size(1536), "1.50 KiB");
        assert_eq!(size((1 << 30) - 1), "1023.99 MiB");
        assert_eq!(size(1 << 40), "1 TiB");
        assert_eq!(size(u64::MAX), "16383.99 PiB");
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text in any::<String>(), lines in "([0-9a-z:/ ,.\\\\-]{0,30}\n){0,6}") {
            for text in [&text, &lines] {
                own_cgroups(text);
                text.lines().filter_map(Mount::parse).for_each(drop);
                let _ = (memory_limit(text), address_space_limit(text), kib_field(text, "a"), stat_field(text, "a"));
                prop_assert!(unescape(text).len() <= text.len());
            }
        }
    }
}

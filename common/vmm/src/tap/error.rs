//! Why a TAP interface cannot be had, and what helps.

use std::io;

use super::{DEVICE, MAX_NAME, sys};

/// Why a TAP interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No interface is called that.
    #[error(
        "{name:?} is no name of an interface: use 1 to {MAX_NAME} characters without spaces, '/', ':' or '%'"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// The host has no TAP interfaces.
    #[error(
        "this host has no {DEVICE} ({source}): load the kernel's module (modprobe tun), or give the container that device"
    )]
    Missing {
        /// What the system said.
        source: io::Error,
    },
    /// The device cannot be opened.
    #[error("cannot open {DEVICE}: {source}; run this as root, or let its user read and write that file")]
    Device {
        /// What the system said.
        source: io::Error,
    },
    /// This process may neither make the interface nor use it.
    #[error(
        "no permission for the interface {name}: give this process CAP_NET_ADMIN, or have root make the interface for its user: ip tuntap add {name} mode tap user USER"
    )]
    Permission {
        /// The interface.
        name: String,
    },
    /// Another process has it.
    #[error(
        "the interface {name} is in use by another process: only one may have it; end the other one, or name another interface"
    )]
    Busy {
        /// The interface.
        name: String,
    },
    /// It is there, and it is something else.
    #[error(
        "the interface {name} is no TAP interface with one queue: name another one, or make it anew: ip link delete {name}; ip tuntap add {name} mode tap"
    )]
    Kind {
        /// The interface.
        name: String,
    },
    /// It is down and this process may not change that.
    #[error(
        "the interface {name} is down: bring it up (ip link set {name} up), or give this process CAP_NET_ADMIN"
    )]
    Down {
        /// The interface.
        name: String,
    },
    /// The kernel is too old for what is needed.
    #[error("this kernel's TAP interfaces cannot {what}: {source}; run Linux 5.0 or newer")]
    Kernel {
        /// What they cannot.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else.
    #[error("cannot {doing} the interface {name}: {source}; the kernel's log (dmesg) may say more")]
    System {
        /// The interface.
        name: String,
        /// What was tried.
        doing: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl TapError {
    /// The device could not be opened.
    pub(super) fn device(source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::Missing { source },
            _ => Self::Device { source },
        }
    }

    /// The interface could not be made or attached to.
    pub(super) fn attach(name: &str, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Permission { name },
            Some(libc::EBUSY) => Self::Busy { name },
            Some(libc::EINVAL | libc::EEXIST) if sys::exists(&name) => Self::Kind { name },
            _ => Self::System { name, doing: "attach to", source },
        }
    }

    /// The interface could not be brought up.
    pub(super) fn up(name: &str, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Down { name },
            _ => Self::System { name, doing: "bring up", source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::TapError;
    use std::io;

    /// What no test host can be brought to say; the rest is shown with real interfaces, in tests/tests/tap.rs.
    #[test]
    fn a_host_without_tap_interfaces_is_told_from_one_that_keeps_them_back() {
        let of = |errno| TapError::device(io::Error::from_raw_os_error(errno));
        for errno in [libc::ENOENT, libc::ENODEV, libc::ENXIO] {
            let error = of(errno);
            assert!(matches!(error, TapError::Missing { .. }), "{error}");
            assert!(error.to_string().contains("modprobe tun"), "{error}");
        }
        let error = of(libc::EACCES);
        assert!(matches!(error, TapError::Device { .. }) && error.to_string().contains("root"), "{error}");
    }
}

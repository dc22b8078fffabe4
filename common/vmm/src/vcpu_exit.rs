//! One KVM_RUN and why it ended, with the size of each port access: kvm-ioctls hands over the bytes of a
//! string instruction without saying how many belong to one access.

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_EXIT_IO_OUT, KVM_INTERNAL_ERROR_EMULATION};
use kvm_ioctls::{VcpuExit, VcpuFd};

/// Why a vCPU came back.
#[derive(Debug)]
pub(crate) enum Exit<'a> {
    /// IN: each `size` bytes of `data` are one access.
    PortIn {
        port: u16,
        size: usize,
        data: &'a mut [u8],
    },
    /// OUT: each `size` bytes of `data` are one access.
    PortOut {
        port: u16,
        size: usize,
        data: &'a [u8],
    },
    MmioRead {
        address: u64,
        data: &'a mut [u8],
    },
    MmioWrite {
        address: u64,
        data: &'a [u8],
    },
    /// A signal, `immediate_exit`, or a vCPU that waits for its start: enter again when nothing else is asked.
    Interrupted,
    /// The dirty ring wants a harvest.
    RingFull,
    /// Triple fault.
    Shutdown,
    /// KVM cannot go on; the instruction's bytes where it gives them.
    Internal {
        suberror: u32,
        instruction: Vec<u8>,
    },
    /// The processor did not enter.
    FailEntry(u64),
    /// Anything that this machine has no answer to.
    Other(String),
}

enum Kind {
    Port,
    Mmio,
    Internal,
}

/// Enters the guest once.
pub(crate) fn run(fd: &mut VcpuFd) -> Exit<'_> {
    let kind = match fd.run() {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => Kind::Port,
        Ok(VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..)) => Kind::Mmio,
        Ok(VcpuExit::InternalError) => Kind::Internal,
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return Exit::Interrupted,
        Ok(VcpuExit::Shutdown) => return Exit::Shutdown,
        Ok(VcpuExit::FailEntry(reason, _)) => return Exit::FailEntry(reason),
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => return Exit::RingFull,
        Ok(other) => return Exit::Other(format!("KVM exit {other:?}")),
        Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => return Exit::Interrupted,
        Err(e) => return Exit::Other(not_run(e.errno(), &e.to_string())),
    };
    match kind {
        Kind::Port => port(fd),
        Kind::Mmio => mmio(fd),
        Kind::Internal => internal(fd),
    }
}

/// Why KVM_RUN failed, with the remedy where there is one.
fn not_run(errno: i32, error: &str) -> String {
    if errno == libc::EFAULT {
        return format!(
            "the host could not give it guest memory (KVM_RUN failed: {error}); free memory on this host or raise \
             its limits (cgroup)"
        );
    }
    format!("KVM_RUN failed: {error}")
}

fn port(fd: &mut VcpuFd) -> Exit<'_> {
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_IO, so KVM filled this member of the union.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (size, port) = (usize::from(io.size), io.port);
    let len = size * io.count as usize;
    let start = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: KVM placed the data at this offset inside the mapping that `run` begins, which is larger than
    // `kvm_run` and lives as long as the vCPU.
    let data = unsafe { start.add(io.data_offset as usize) };
    // SAFETY: KVM wrote, or will read, `len` bytes there, and `fd` stays borrowed as long as the slice.
    let data = unsafe { std::slice::from_raw_parts_mut(data, len) };
    if u32::from(io.direction) == KVM_EXIT_IO_OUT {
        Exit::PortOut { port, size, data }
    } else {
        Exit::PortIn { port, size, data }
    }
}

fn mmio(fd: &mut VcpuFd) -> Exit<'_> {
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_MMIO, so KVM filled this member of the union.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let len = (mmio.len as usize).min(mmio.data.len());
    let (address, data) = (mmio.phys_addr, &mut mmio.data[..len]);
    if mmio.is_write != 0 { Exit::MmioWrite { address, data } } else { Exit::MmioRead { address, data } }
}

fn internal(fd: &mut VcpuFd) -> Exit<'_> {
    let run = fd.get_kvm_run();
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so KVM filled this member of the union.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let suberror = internal.suberror;
    let mut instruction = Vec::new();
    // data[0] is a set of flags, whose bit 0 says that a length byte and 15 bytes of code follow.
    if suberror == KVM_INTERNAL_ERROR_EMULATION && internal.ndata >= 3 && internal.data[0] & 1 != 0 {
        let bytes: Vec<u8> = internal.data[1..3].iter().flat_map(|word| word.to_le_bytes()).collect();
        instruction = bytes[1..].iter().take(usize::from(bytes[0])).copied().collect();
    }
    Exit::Internal { suberror, instruction }
}

#[cfg(test)]
mod tests {
    use super::not_run;

    #[test]
    fn memory_that_the_host_does_not_give_is_said_so() {
        let text = not_run(libc::EFAULT, "Bad address (os error 14)");
        assert!(text.contains("could not give it guest memory") && text.contains("free memory"), "{text}");
        assert_eq!(not_run(libc::EINVAL, "Invalid argument"), "KVM_RUN failed: Invalid argument");
    }
}

//! The processor of a guest, as far as another host must be like it, and what a host offers. [`HostCpu::check`] is the
//! one answer to whether a guest can run on there: pairing asks it before a link is made, restore before anything is set.

use super::cpuid::{CpuidError, CpuidTable};
use crate::state::StateError;

/// What a guest's processor is made of. It keeps it wherever it runs on.
#[derive(Clone, Debug, PartialEq)]
pub struct GuestCpu {
    /// The CPUID that it was started with.
    pub cpuid: CpuidTable,
    /// Rate of its TSC in kHz.
    pub tsc_khz: u32,
    /// Whether its TSC stops at a cut and moves with it; if not, it sees the host's own.
    pub tsc_moves: bool,
}

/// Why a guest's processor cannot be had on a host.
#[derive(Debug, thiserror::Error)]
pub enum CpuMisfit {
    /// Its features, or RAM that it cannot address.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// Another TSC rate: the guest's time would run wrong.
    #[error(
        "the guest's TSC runs at {guest} kHz and this host's at {host} kHz, and Colo does not have it scaled: use \
         hosts of one rate"
    )]
    Rate {
        /// Of the guest, in kHz.
        guest: u32,
        /// Of the host, in kHz.
        host: u32,
    },
    /// A guest on KVM and one in software.
    #[error("a guest on {found} cannot run on as one on {expected}: use nodes that both have KVM")]
    Kind {
        /// What runs it.
        found: &'static str,
        /// What would run it here.
        expected: &'static str,
    },
    /// There is no VM to compare with.
    #[error("the VM that waits here is of no more use after an earlier error: start this node again")]
    NoVm,
    /// The TSC is carried in another way: it would jump.
    #[error(
        "where the guest ran its TSC {}, and on this host it {}; use hosts whose KVM is alike in this \
         (KVM_CAP_VCPU_ATTRIBUTES)",
        how(*guest),
        how(!*guest)
    )]
    Carried {
        /// Whether the guest's moves.
        guest: bool,
    },
}

fn how(moves: bool) -> &'static str {
    if moves { "moves with the guest" } else { "is the host's own" }
}

impl From<CpuMisfit> for StateError {
    fn from(misfit: CpuMisfit) -> Self {
        let part = match misfit {
            CpuMisfit::Cpuid(_) => "CPU model",
            CpuMisfit::Rate { .. } | CpuMisfit::Carried { .. } => "TSC",
            CpuMisfit::Kind { .. } | CpuMisfit::NoVm => "machine",
        };
        Self::Refused { part: part.to_owned(), reason: misfit.to_string() }
    }
}

/// What a host gives the guest of one VM.
#[derive(Clone, Debug)]
pub(crate) struct HostCpu {
    /// All that KVM supports.
    pub(crate) supported: CpuidTable,
    /// Rate of a guest's TSC that is not scaled, in kHz.
    pub(crate) tsc_khz: u32,
    /// Whether a guest's TSC can be moved.
    pub(crate) tsc_moves: bool,
    /// Frames up to the end of the guest's RAM.
    pub(crate) frames: u64,
}

impl HostCpu {
    /// Refuses a guest that could not run on here.
    ///
    /// # Errors
    /// The first thing that does not fit.
    pub(crate) fn check(&self, guest: &GuestCpu) -> Result<(), CpuMisfit> {
        // Readings of one rate differ by a little from boot to boot, so up to 250 ppm is the same rate.
        if guest.tsc_khz.abs_diff(self.tsc_khz) > self.tsc_khz / 4000 {
            return Err(CpuMisfit::Rate { guest: guest.tsc_khz, host: self.tsc_khz });
        }
        if guest.tsc_moves != self.tsc_moves {
            return Err(CpuMisfit::Carried { guest: guest.tsc_moves });
        }
        guest.cpuid.check_runs_on(&self.supported)?;
        Ok(guest.cpuid.check_reaches(self.frames)?)
    }
}

#[cfg(test)]
mod tests {
    use super::super::cpuid::tests::{everything, of_a_guest};
    use super::{CpuMisfit, GuestCpu, HostCpu, StateError};
    use crate::arch::x86_64::cpuid::CpuidTable;

    fn host() -> HostCpu {
        let supported = CpuidTable::from_entries(everything());
        HostCpu { supported, tsc_khz: 2_445_430, tsc_moves: true, frames: 1 << 18 }
    }

    fn guest() -> GuestCpu {
        GuestCpu { cpuid: of_a_guest(), tsc_khz: 2_445_430, tsc_moves: true }
    }

    #[test]
    fn another_tsc_rate_is_refused_and_a_reading_of_the_same_is_not() {
        for near in [2_445_430, 2_445_500, 2_445_430 - 611] {
            host().check(&GuestCpu { tsc_khz: near, ..guest() }).unwrap();
        }
        for far in [0, 1, 2_445_430 + 612, 2_600_000, u32::MAX] {
            let misfit = host().check(&GuestCpu { tsc_khz: far, ..guest() }).unwrap_err();
            let text = misfit.to_string();
            assert!(matches!(misfit, CpuMisfit::Rate { .. }), "{text}");
            assert!(text.contains(&format!("{far} kHz")) && text.contains("2445430 kHz"), "{text}");
            assert!(text.contains("use hosts of one rate"), "{text}");
        }
        let none = HostCpu { tsc_khz: 0, ..host() };
        assert!(none.check(&guest()).is_err());
    }

    #[test]
    fn a_tsc_that_is_carried_another_way_is_refused() {
        for tsc_moves in [true, false] {
            let guest = GuestCpu { tsc_moves, ..guest() };
            HostCpu { tsc_moves, ..host() }.check(&guest).unwrap();
            let text = HostCpu { tsc_moves: !tsc_moves, ..host() }.check(&guest).unwrap_err().to_string();
            assert!(text.contains("its TSC") && text.contains("use hosts whose KVM is alike"), "{text}");
        }
    }

    #[test]
    fn features_and_reach_are_part_of_it_and_a_restore_says_the_same() {
        let mut poor = everything();
        poor.retain(|entry| entry.function != 7);
        let poor = HostCpu { supported: CpuidTable::from_entries(poor), ..host() };
        let misfit = poor.check(&guest()).unwrap_err();
        let text = misfit.to_string();
        assert!(text.contains("AVX512F") && text.contains("choose a lower CPU model"), "{text}");
        let refused = StateError::from(misfit).to_string();
        assert!(refused.contains(&text) && refused.contains("saved CPU model"), "{refused}");
        let mut narrow = guest();
        narrow.cpuid = narrow.cpuid.with_address_bits(32);
        let text = HostCpu { frames: 1 << 21, ..host() }.check(&narrow).unwrap_err().to_string();
        assert!(text.contains("addresses 32 bits"), "{text}");
    }
}

//! Chips that one VM shares: PIC pair, I/O APIC and PIT, all inside KVM.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_PIT_SPEAKER_DUMMY, kvm_irqchip,
    kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use std::io;

use crate::arch::x86_64::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::state::StateError;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The interval timer at a cut.
pub(crate) type Pit = kvm_pit_state2;

/// The chips at a cut.
#[derive(Clone, Serialize, Deserialize)]
pub struct ChipState {
    pit: kvm_pit_state2,
    /// PIC master, PIC slave, I/O APIC.
    irqchips: [kvm_irqchip; 3],
}

impl std::fmt::Debug for ChipState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChipState")
    }
}

/// Makes the chips, before the first vCPU.
pub(crate) fn create(vm: &VmFd) -> io::Result<()> {
    vm.set_identity_map_address(KVM_IDENTITY_MAP)?;
    vm.set_tss_address(KVM_TSS as usize)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })?;
    Ok(())
}

/// Whether the timer ticks again and again. KVM keeps every tick that the guest has not taken, also while the guest
/// stands still, and makes up for all of them.
pub(crate) fn is_periodic(pit: &Pit) -> bool {
    // Rate generator and square wave.
    matches!(pit.channels[0].mode, 2 | 3)
}

impl ChipState {
    /// Reads the chips; all vCPUs are stopped.
    pub(crate) fn save(vm: &VmFd) -> io::Result<Self> {
        let pit = vm.get_pit2()?;
        let mut irqchips = [kvm_irqchip::default(); 3];
        for (chip, id) in irqchips.iter_mut().zip(CHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip)?;
        }
        Ok(Self { pit, irqchips })
    }

    /// Sets the chips, after the vCPUs and their LAPICs.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        let refused = |part: &str, e: kvm_ioctls::Error| StateError::Refused {
            part: part.to_owned(),
            reason: e.to_string(),
        };
        vm.set_pit2(&self.pit).map_err(|e| refused("interval timer", e))?;
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(|e| refused("interrupt controller", e))?;
        }
        Ok(())
    }

    pub(crate) fn pit(&self) -> Pit {
        self.pit
    }

    pub(crate) fn set_pit(&mut self, pit: Pit) {
        self.pit = pit;
    }

    pub(crate) fn check_limits(&self) -> Result<(), StateError> {
        let ids: Vec<u32> = self.irqchips.iter().map(|chip| chip.chip_id).collect();
        if ids == CHIPS {
            Ok(())
        } else {
            Err(StateError::Malformed(format!("interrupt controllers {ids:?}")))
        }
    }
}

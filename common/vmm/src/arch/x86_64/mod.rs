//! The x86-64 PC: address map, tables for the guest's kernel, CPUID, and vCPU and chip state.

pub mod acpi;
pub mod boot_regs;
pub mod chips;
pub mod clock;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod msrs;
pub mod processor;
pub mod vcpu_state;

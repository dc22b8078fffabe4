//! `coloctl demo`: the demonstration builds guests and starts nodes, which is the tree's work and not this program's.

use crate::error::CtlError;
use crate::output::print;

/// Says how to run it.
pub(crate) fn run() -> Result<(), CtlError> {
    print(
        "The demo runs from Colo's source tree:\n\n    \
         make demo                  one run\n    \
         make demo RUNS=10 SEED=7   ten runs, the instants of the kills drawn from this seed\n\n\
         It starts a secondary and a primary with a guest, kills the primary at a random instant, and checks\n\
         that the guest goes on at the secondary with nothing taken back. The figures are printed, and left in\n\
         target/demo/summary.json.\n",
    )
}

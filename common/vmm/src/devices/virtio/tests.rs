//! The devices as drivers see them, good ones and hostile ones.

mod block;
mod driver;
mod hostile;
mod net;

use super::*;

//! What layer constructors find on their thread while a model is built: their signatures are candle_nn's.

use candle_core::Result;
use std::cell::RefCell;
use std::thread::LocalKey;

pub(crate) type Building<T> = LocalKey<RefCell<Option<T>>>;

/// Puts back what was there, also when the constructors panic.
struct Restore<T: 'static>(&'static Building<T>, Option<T>);

impl<T: 'static> Drop for Restore<T> {
    fn drop(&mut self) {
        self.0.with(|building| *building.borrow_mut() = self.1.take());
    }
}

/// Runs `build` with `value` in the place.
pub(crate) fn within<T: 'static, M>(
    building: &'static Building<T>,
    value: T,
    build: impl FnOnce() -> Result<M>,
) -> Result<M> {
    let _restore = Restore(building, building.with(|b| b.borrow_mut().replace(value)));
    build()
}

//! Pooled boxed futures: dynamic dispatch and recursion without a heap allocation a call.
//!
//! A driver call (`fn read(&self, ...) -> PooledFuture`) and a task both need their future at an
//! address that does not move. `Box` would mean one allocation and one free an I/O; here the memory
//! comes from free lists in size classes that a [`Pool`] keeps. Futures larger than the largest class
//! use the global allocator, and are counted.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::ptr::NonNull;
use std::rc::Rc;
use std::task::{Context, Poll};

/// Block sizes of the free lists. Every block is aligned to [`BLOCK_ALIGN`].
const CLASSES: [usize; 7] = [128, 256, 512, 1024, 2048, 4096, 8192];
const BLOCK_ALIGN: usize = 64;
/// Blocks that each free list keeps; more are given back to the allocator.
const FREE_MAX: usize = 4096;

/// Free lists of future-sized memory, shared by all who clone the handle.
#[derive(Clone, Default)]
pub struct Pool(Rc<PoolInner>);

#[derive(Default)]
struct PoolInner {
    free: [RefCell<Vec<NonNull<u8>>>; CLASSES.len()],
    misses: Cell<u64>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("misses", &self.0.misses.get()).finish()
    }
}

impl Pool {
    /// How often memory had to come from the global allocator.
    pub fn misses(&self) -> u64 {
        self.0.misses.get()
    }

    fn take(&self, layout: Layout) -> (NonNull<u8>, Layout, Option<u8>) {
        let class = CLASSES.iter().position(|&size| layout.size() <= size && layout.align() <= BLOCK_ALIGN);
        let real = match class {
            Some(class) => {
                if let Some(ptr) = self.0.free[class].borrow_mut().pop() {
                    return (ptr, Layout::new::<()>(), Some(class as u8));
                }
                class_layout(class)
            }
            // A zero-sized request cannot get here: it fits the smallest class.
            None => layout,
        };
        self.0.misses.set(self.0.misses.get() + 1);
        // SAFETY: `real` has a size above zero (the smallest class is 128 bytes, and a layout that
        // fits no class is larger than the largest one or needs more than 64 bytes of alignment).
        let ptr = unsafe { alloc(real) };
        let Some(ptr) = NonNull::new(ptr) else { handle_alloc_error(real) };
        (ptr, real, class.map(|c| c as u8))
    }

    fn give(&self, ptr: NonNull<u8>, class: u8) {
        let mut free = self.0.free[class as usize].borrow_mut();
        if free.len() < FREE_MAX {
            free.push(ptr);
        } else {
            // SAFETY: every block of this class was allocated by `take` with this very layout, and
            // the caller gives up its only pointer to it.
            unsafe { dealloc(ptr.as_ptr(), class_layout(class as usize)) }
        }
    }
}

impl Drop for PoolInner {
    fn drop(&mut self) {
        for (class, free) in self.free.iter_mut().enumerate() {
            for ptr in free.get_mut().drain(..) {
                // SAFETY: blocks on a free list are owned by the list alone and have its class's layout.
                unsafe { dealloc(ptr.as_ptr(), class_layout(class)) }
            }
        }
    }
}

fn class_layout(class: usize) -> Layout {
    match Layout::from_size_align(CLASSES[class], BLOCK_ALIGN) {
        Ok(layout) => layout,
        Err(_) => unreachable!("the block sizes and their alignment are constants that form layouts"),
    }
}

/// An owned, type-erased future in pooled memory.
pub struct PooledFuture<'a, T> {
    data: NonNull<u8>,
    poll: unsafe fn(NonNull<u8>, &mut Context<'_>) -> Poll<T>,
    drop: unsafe fn(NonNull<u8>),
    /// `None`: the memory came from the global allocator with `layout`.
    class: Option<u8>,
    layout: Layout,
    pool: Pool,
    _future: PhantomData<Box<dyn Future<Output = T> + 'a>>,
}

impl<'a, T> PooledFuture<'a, T> {
    /// Moves `future` into memory of `pool`.
    pub fn new<F: Future<Output = T> + 'a>(pool: &Pool, future: F) -> PooledFuture<'a, T> {
        let layout = Layout::new::<F>();
        let (data, _, class) = pool.take(layout);
        // SAFETY: `data` points to memory of at least `layout.size()` bytes with at least its
        // alignment, which nobody else uses.
        unsafe { data.cast::<F>().as_ptr().write(future) };
        PooledFuture {
            data,
            poll: poll_erased::<F>,
            drop: drop_erased::<F>,
            class,
            layout,
            pool: pool.clone(),
            _future: PhantomData,
        }
    }
}

/// # Safety
/// `data` holds a live, pinned `F`.
unsafe fn poll_erased<F: Future>(data: NonNull<u8>, cx: &mut Context<'_>) -> Poll<F::Output> {
    // SAFETY: the caller vouches for `data`; the future stays where it is until it is dropped, so
    // pinning it is sound.
    unsafe { Pin::new_unchecked(data.cast::<F>().as_mut()) }.poll(cx)
}

/// # Safety
/// `data` holds a live `F` that is never touched again.
unsafe fn drop_erased<F>(data: NonNull<u8>) {
    // SAFETY: as the caller vouches.
    unsafe { data.cast::<F>().as_ptr().drop_in_place() }
}

impl<T> Future for PooledFuture<'_, T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let this = self.get_mut();
        // SAFETY: `data` was filled by `new` with the `F` that `poll` was made for, and lives until
        // `drop` of this handle.
        unsafe { (this.poll)(this.data, cx) }
    }
}

impl<T> Drop for PooledFuture<'_, T> {
    fn drop(&mut self) {
        // SAFETY: the future is live (see `poll`) and this handle, its only owner, goes away.
        unsafe { (self.drop)(self.data) };
        match self.class {
            Some(class) => self.pool.give(self.data, class),
            // SAFETY: without a class the memory was allocated by `take` with exactly this layout.
            None => unsafe { dealloc(self.data.as_ptr(), self.layout) },
        }
    }
}

impl<T> std::fmt::Debug for PooledFuture<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PooledFuture").field("class", &self.class).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Waker;

    fn run<T>(mut f: PooledFuture<'_, T>) -> T {
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            if let Poll::Ready(v) = Pin::new(&mut f).poll(&mut cx) {
                return v;
            }
        }
    }

    #[test]
    fn memory_is_used_again() {
        let pool = Pool::default();
        for i in 0..100u64 {
            assert_eq!(run(PooledFuture::new(&pool, async move { i + 1 })), i + 1);
        }
        assert_eq!(pool.misses(), 1);
    }

    #[test]
    fn large_and_borrowing_futures() {
        let pool = Pool::default();
        let text = String::from("abc");
        let big = [7u8; 20_000];
        let f = PooledFuture::new(&pool, async {
            let b = big;
            std::future::ready(()).await;
            text.len() + usize::from(b[19_999])
        });
        assert_eq!(run(f), 10);
    }

    #[test]
    fn dropping_unfinished_drops_the_content() {
        let pool = Pool::default();
        let rc = Rc::new(());
        let inner = rc.clone();
        let f = PooledFuture::new(&pool, async move {
            std::future::pending::<()>().await;
            drop(inner);
        });
        assert_eq!(Rc::strong_count(&rc), 2);
        drop(f);
        assert_eq!(Rc::strong_count(&rc), 1);
    }
}

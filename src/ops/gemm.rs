//! Matrix products of slices, for the CPU versions of the operations.

use super::element::Real;

/// A matrix in a slice: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A row-major matrix.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        assert!(data.len() >= rows * cols, "a {rows} x {cols} matrix in a slice of {}", data.len());
        Self { data, rows, cols, row_stride: cols, col_stride: 1 }
    }

    pub(crate) fn t(self) -> Self {
        Self {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// `dst = a b`, or `dst += a b` if `accumulate`, with `dst` row-major; on the calling thread, or on all of rayon's
/// if `parallel`.
pub(crate) fn gemm<T: Real>(dst: &mut [T], accumulate: bool, a: Mat<'_, T>, b: Mat<'_, T>, parallel: bool) {
    assert_eq!(a.cols, b.rows, "inner sizes of a matrix product");
    assert!(dst.len() >= a.rows * b.cols, "result of a matrix product");
    let parallelism = if parallel { gemm::Parallelism::Rayon(0) } else { gemm::Parallelism::None };
    // SAFETY: the sizes and strides stay inside the three slices: `Mat`'s constructors and the assertion above.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            dst.as_mut_ptr(),
            1,
            b.cols as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            T::one(),
            T::one(),
            false,
            false,
            false,
            parallelism,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_by_hand() {
        let (a, b) = ([1f64, 2., 3., 4., 5., 6.], [1f64, 0., 2., 1., 1., 3.]);
        let mut dst = [0f64; 4];
        gemm(&mut dst, false, Mat::new(&a, 2, 3), Mat::new(&b, 3, 2), false);
        assert_eq!(dst, [8., 11., 20., 23.]);
        gemm(&mut dst, true, Mat::new(&a, 2, 3), Mat::new(&b, 2, 3).t(), false);
        assert_eq!(dst, [8. + 7., 11. + 12., 20. + 16., 23. + 27.]);
    }
}

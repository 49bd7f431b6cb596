//! A row's result depends neither on the rows beside it nor on the number of threads.

use quaver_core::host::slices::{ActIn, ActOut, ColsOut, ScaleIn, ScaleOut, Slice, SliceMut, WeightIn};
use quaver_core::host::{Kernels, KvIn, RowsIn};
use quaver_core::op::Heads;
use quaver_core::philox::{philox, uniform};

use super::{CpuKernels, kernels};

const ROWS: usize = 64;

/// Numbers between -2 and 2, the same on every run.
fn numbers(n: usize, seed: u32) -> Vec<f32> {
    (0..n as u32).map(|i| uniform(philox([i, 0, 0, 0], [seed, 0])[0]) * 4.0 - 2.0).collect()
}

/// Runs `op(kernels, first row, rows)` on all rows and on some alone, on one thread, two and five: `width` results a
/// row, whose bits must not differ.
fn assert_independent(width: usize, op: impl Fn(&mut CpuKernels, usize, usize) -> Vec<f32>) {
    let bits = |list: Vec<f32>| list.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let open = |threads| kernels(Some(threads)).expect("threads start");
    let all = bits(op(&mut open(1), 0, ROWS));
    assert_eq!(all.len(), ROWS * width);
    for threads in [1, 2, 5] {
        let mut kernels = open(threads);
        assert!(bits(op(&mut kernels, 0, ROWS)) == all, "{threads} threads");
        for (first, rows) in [(0, 1), (17, 1), (63, 1), (30, 3), (1, 63)] {
            let alone = bits(op(&mut kernels, first, rows));
            assert!(alone == all[first * width..][..rows * width], "{rows} rows from {first}, {threads} threads");
        }
    }
}

#[test]
fn a_row_of_linear_does_not_depend_on_its_neighbours_or_on_threads() {
    let (n, k) = (37, 523);
    let (x, w, scales) = (numbers(ROWS * k, 1), numbers(n * k, 2), numbers(n, 3));
    let codes: Vec<u8> = w.iter().map(|&w| quaver_core::e4m3::encode(w * 200.0)).collect();
    for (data, scale) in [(Slice::F32(&w), None), (Slice::E4m3(&codes), Some(&scales[..]))] {
        assert_independent(n, |kernels, first, rows| {
            let x = ActIn { data: Slice::F32(&x[first * k..][..rows * k]), scale: ScaleIn::None };
            let mut y = vec![0.0; rows * n];
            let out = ColsOut { data: SliceMut::F32(&mut y), stride: n, first: 0, n };
            kernels.linear(x, WeightIn { data, scale }, k, out, false);
            y
        });
    }
}

#[test]
fn a_row_of_rms_norm_does_not_depend_on_its_neighbours_or_on_threads() {
    let d = 523;
    let (x, gamma) = (numbers(ROWS * d, 1), numbers(d, 2));
    assert_independent(d, |kernels, first, rows| {
        let mut y = vec![0.0; rows * d];
        let out = ActOut { data: SliceMut::F32(&mut y), scale: ScaleOut::None };
        kernels.rms_norm(&x[first * d..][..rows * d], &gamma, 1e-5, out);
        y
    });
}

/// Rows of two sequences, so that alone they are decode rows, and together two prefills.
#[test]
fn a_row_of_attend_does_not_depend_on_its_neighbours_or_on_threads() {
    let heads = Heads { q: 8, kv: 2, dim: 40 };
    let (width, page_tokens, pages, prefix) = (heads.q * heads.dim, 16, 8, 70);
    let q = numbers(ROWS * width, 1);
    let cache = |seed| numbers(2 * pages * heads.kv * page_tokens * heads.dim, seed);
    let (k, v) = (cache(2), cache(3));
    let page_table: Vec<u32> = (0..2 * pages as u32).map(|page| page * 5 % 16).collect();
    let row = |i: usize| (i as u32 / 40, prefix + i as u32 % 40);
    let (seq, position): (Vec<u32>, Vec<u32>) = (0..ROWS).map(row).unzip();
    assert_independent(width, |kernels, first, rows| {
        let range = first..first + rows;
        let mut spans: Vec<[u32; 4]> = Vec::new();
        for i in range.clone() {
            match spans.last_mut().filter(|span| span[2] == seq[i]) {
                Some(span) => span[1] += 1,
                None => spans.push([(i - first) as u32, 1, seq[i], position[i]]),
            }
        }
        let who = RowsIn {
            seq: &seq[range.clone()],
            position: &position[range],
            page_table: &page_table,
            pages,
            spans: &spans,
        };
        let kv = KvIn { k: Slice::F32(&k), v: Slice::F32(&v), page_tokens, scales: (1.0, 1.0) };
        let mut y = vec![0.0; rows * width];
        let out = ActOut { data: SliceMut::F32(&mut y), scale: ScaleOut::None };
        kernels.attend(Slice::F32(&q[first * width..][..rows * width]), who, heads, kv, out);
        y
    });
}

//! The ops that move numbers and compute none: `Embed`, `Gather`, `CopyPages`; and `AbsMax`. All byte-equal.

use bytemuck::cast;
use quaver_core::op::{CHOSEN, DType, Kv, Op, StaticScale};
use quaver_core::sampler::{NO_TOKEN, Sampled};

use super::List;
use crate::parity::bound::Bound;
use crate::parity::build::{Axis, Builder, encode};
use crate::parity::{Problem, Rng};

pub fn add(list: &mut List) {
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::Bf16)] {
        for (m, d) in [(0, 64), (1, 64), (3, 100), (17, 2048), (64, 37)] {
            list.add("embed", format!("{name}_m{m}_d{d}"), move |rng| embed(rng, dtype, m, d));
        }
    }
    for (m, w, d) in [(1, 1, 64), (17, 3, 2048), (64, 17, 100), (5, 9, 37), (3, 0, 64)] {
        list.add("gather", format!("m{m}_w{w}_d{d}"), move |rng| gather(rng, m, w, d));
    }
    list.drawn("embed", |rng| {
        let (dtype, m, d) = (rng.pick(&[DType::F32, DType::Bf16]), 1 + rng.below(70), 2 + rng.below(900));
        (format!("{dtype:?}_m{m}_d{d}"), move |rng: &mut Rng| embed(rng, dtype, m, d))
    });
    list.drawn("gather", |rng| {
        let (m, w, d) = (1 + rng.below(70), 1 + rng.below(20), 2 + rng.below(900));
        (format!("m{m}_w{w}_d{d}"), move |rng: &mut Rng| gather(rng, m, w, d))
    });
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::Bf16), ("fp8", DType::E4m3)] {
        list.add("copy_pages", name, move |rng| copy_pages(rng, dtype));
    }
    for (m, k) in [(0, 64), (1, 64), (3, 100), (17, 2048), (130, 37)] {
        list.add("abs_max", format!("m{m}_k{k}"), move |rng| abs_max(&rng.normals(m * k, 2.0), k, 0.0));
    }
    list.add("abs_max", "keeps_a_larger_maximum", |rng| abs_max(&rng.normals(17 * 64, 2.0), 64, 1e6));
    list.add("abs_max", "of_the_last_element", |rng| {
        let mut values = rng.normals(17 * 65, 1.0);
        *values.last_mut().expect("not empty") = -1e5;
        abs_max(&values, 65, 3.0)
    });
}

fn embed(rng: &mut Rng, dtype: DType, m: usize, d: usize) -> Problem {
    let vocab = 301;
    let w = 5;
    let mut b = Builder::new(m, w, 0);
    let mut ids: Vec<u32> = (0..m).map(|_| rng.below(vocab) as u32).collect();
    // The table's first and last row, and one row twice.
    for (id, edge) in ids.iter_mut().zip([vocab as u32 - 1, 0, 0]) {
        *id = edge;
    }
    // Every third row takes what the last step chose: of the last row nothing.
    ids.iter_mut().enumerate().skip(2).step_by(3).for_each(|(i, id)| *id = CHOSEN | (i % w) as u32);
    let sampled = (0..w).flat_map(|row| {
        let token = if row + 1 == w { NO_TOKEN } else { rng.below(vocab) as u32 };
        cast::<Sampled, [u32; 44]>(Sampled { token, ..Sampled::NONE })
    });
    let sampled = b.input_u32("sampled", Axis::Wanted, 44, &sampled.collect::<Vec<_>>());
    let ids = b.input_u32("ids", Axis::Rows, 1, &ids);
    let table = b.constant("table", dtype, d, encode(dtype, &rng.normals(vocab * d, 1.0)), &[]);
    let out = b.output("out", DType::F32, Axis::Rows, d);
    b.op(Op::Embed { ids, sampled, table, out });
    b.expect(out, Bound::Bytes);
    b.finish()
}

fn gather(rng: &mut Rng, m: usize, w: usize, d: usize) -> Problem {
    let mut b = Builder::new(m, w, 0);
    let x = b.input_f32("x", Axis::Rows, d, &rng.normals(m * d, 1.0));
    let mut wanted: Vec<u32> = (0..w).map(|_| rng.below(m) as u32).collect();
    wanted.iter_mut().take(1).for_each(|row| *row = m as u32 - 1);
    let wanted = b.input_u32("wanted", Axis::Wanted, 1, &wanted);
    let out = b.output("out", DType::F32, Axis::Wanted, d);
    b.op(Op::Gather { x, wanted, out });
    b.expect(out, Bound::Bytes);
    b.finish()
}

fn copy_pages(rng: &mut Rng, dtype: DType) -> Problem {
    let (pages, page_rows, dim) = (9, 2 * 16, 24);
    let mut b = Builder::new(1, 0, 0);
    let cache = |b: &mut Builder, name, rng: &mut Rng| {
        let values = rng.normals(pages * page_rows * dim, 1.0);
        b.input(name, dtype, Axis::Fixed(pages * page_rows), dim, encode(dtype, &values))
    };
    let (k, v) = (cache(&mut b, "k", rng), cache(&mut b, "v", rng));
    let pairs = b.input_u32("pairs", Axis::Fixed(5), 2, &[1, 7, 1, 2, 8, 0, 0, 0, 0, 0]);
    let scales = (dtype == DType::E4m3).then_some((StaticScale::new(0.1), StaticScale::new(0.2)));
    let kv = Kv { k, v, page_tokens: 16, scales };
    b.op(Op::CopyPages { kv, page_rows, pairs });
    let page = page_rows * dim;
    for buf in [k, v] {
        let at = [7, 2, 0].iter().flat_map(|to| to * page..(to + 1) * page).collect();
        b.expect_at(buf, at, dim, Bound::Bytes);
    }
    b.finish()
}

fn abs_max(values: &[f32], k: usize, before: f32) -> Problem {
    let mut b = Builder::new(values.len() / k, 0, 0);
    let x = b.input_f32("x", Axis::Rows, k, values);
    let out = b.input_f32("out", Axis::Fixed(1), 1, &[before]);
    b.op(Op::AbsMax { x, out });
    b.expect(out, Bound::Bytes);
    b.finish()
}

use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{Device, Tensor};
use half::{bf16, f16};

use super::*;
use crate::gpu::{Gpu, args};

fn source(stem: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/emulator/{stem}.cu"))
}

args! {
    struct Broken { a: u64, out: u64, words: u64, len: u64 }
}

/// One launch of a kernel of `broken.cu`: what it says if it fails, also at the end of the emulation.
fn broken(kernel: &str, blocks: usize) -> std::result::Result<Vec<f32>, String> {
    let run = || -> Result<Vec<f32>> {
        let gpu = Gpu::emulated().expect("within emulate");
        let a = Tensor::arange(0f32, 64.0, &Device::Cpu)?;
        let (out, words) = (gpu.tensor(64, DType::F32)?, Tensor::zeros(64, DType::U32, &Device::Cpu)?);
        let operands = [gpu.operand(&a, "a")?, gpu.operand(&out, "out")?, gpu.operand(&words, "words")?];
        let [a, target, words] = operands.each_ref().map(Operand::address);
        let args = Broken { a, out: target, words, len: 64 };
        launch_of(&source("broken"), kernel, Grid::line(blocks, 64)?, &args)?;
        out.to_vec1()
    };
    match catch_unwind(AssertUnwindSafe(|| emulate(run))) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(panic.downcast_ref::<String>().cloned().unwrap_or_default()),
    }
}

#[test]
fn mistakes_are_found() {
    if emulate(Gpu::emulated).is_none() {
        return;
    }
    let race = "nothing puts them in order";
    for (kernel, blocks, parts) in [
        ("no_barrier", 1, ["s[", ", which the block has not written, by thread 0 at broken.cu:", ""]),
        ("reuse_without_barrier", 1, ["a race: thread", "s[", race]),
        ("half_barrier", 1, ["a barrier that only 32 of 64 threads reach at broken.cu:", "", ""]),
        ("barrier_after_return", 1, ["a barrier that only 63 of 64 threads reach", "", ""]),
        ("two_barriers", 1, ["threads of a block at different barriers, broken.cu:", "", ""]),
        ("write_past_end", 1, ["a write beyond out: 0 bytes after its end", "thread 63", "broken.cu:"]),
        ("read_past_end", 1, ["a read beyond a: 0 bytes after its end", "thread 63", "broken.cu:"]),
        ("read_before_start", 1, ["a read beyond a: 4 bytes before its start", "thread 0", "broken.cu:"]),
        ("read_null", 1, ["a read through an address that is null", "", "broken.cu:"]),
        ("shared_index", 1, ["an index beyond an array's bounds at broken.cu:", "", ""]),
        ("shared_pointer", 1, ["a write beyond s: 0 bytes after its end", "thread 63", "broken.cu:"]),
        ("local_index", 1, ["an index beyond an array's bounds at broken.cu:", "", ""]),
        ("misaligned", 1, ["no multiple of its type's alignment at broken.cu:", "", ""]),
        ("wide_shift", 1, ["a shift by more than the type has bits at broken.cu:", "", ""]),
        (
            "unwritten_shared",
            1,
            ["a read of s[", "which the block has not written, by thread 63", "broken.cu:"],
        ),
        ("unwritten_global", 1, ["a read of out[", "which nothing has written", "broken.cu:"]),
        ("unwritten_element", 1, ["no kernel has written element 5 of out", "", ""]),
        (
            "missing_lanes",
            1,
            ["a warp operation that lacks 12 of the lanes in its mask at broken.cu:", "", ""],
        ),
        ("mask_without_caller", 1, ["a warp operation whose mask lacks the calling lane", "", ""]),
        ("shuffle_from_outside", 1, ["a shuffle from lane 16, which its mask lacks", "", ""]),
        ("two_operations", 1, ["lanes of a warp at different operations", "", ""]),
        ("lanes_unordered", 1, ["a race: thread", "s[", race]),
        ("lanes_after_shuffle", 1, ["a race: thread", "s[", race]),
        ("lanes_of_two_halves", 1, ["a race: thread", "s[", race]),
        ("warps_after_syncwarp", 1, ["a race: thread", "s[", race]),
        ("blocks_write", 2, ["a race: two blocks, one of them writing, at out[", "", ""]),
        ("block_reads", 2, ["a race: two blocks, one of them writing, at words[", "", ""]),
        ("last_block_without_fence", 4, ["a race: two blocks, one of them writing, at out[", "", ""]),
        ("order_of_threads", 1, ["differs with the order of its threads", "", ""]),
        ("atomic_and_plain", 1, ["a race: thread", "words[0]", race]),
        ("copy_without_wait", 1, ["an asynchronous copy that its thread never waits for", "", ""]),
        ("copy_without_barrier", 1, ["a race: thread", "s[", race]),
        ("absent", 1, ["not in the compiled file", "", ""]),
    ] {
        let error = broken(kernel, blocks).expect_err(kernel);
        assert!(parts.iter().all(|part| error.contains(part)), "{kernel}: {error}");
    }
}

#[test]
fn what_is_right_passes() {
    if emulate(Gpu::emulated).is_none() {
        return;
    }
    for (kernel, blocks, value) in [
        ("fine_barrier", 1, 2.0),
        ("fine_reuse", 1, 5.0),
        ("fine_half_warp", 1, 2.0),
        ("fine_lanes", 1, 17.0),
        ("fine_last_block", 4, 1.0),
        ("fine_count", 1, 1.0 + 2016.0 + 32.0 + 1.0),
        ("fine_copy", 1, 0.0),
    ] {
        let out = broken(kernel, blocks).unwrap_or_else(|error| panic!("{kernel}: {error}"));
        assert_eq!(out[1], value, "{kernel}");
    }
}

#[test]
fn wrong_launches_are_refused() -> Result<()> {
    emulate(|| {
        let Some(gpu) = Gpu::emulated() else { return Ok(()) };
        args! { struct Short { a: u64 } }
        let args = Broken { a: 0, out: 0, words: 0, len: 0 };
        for (threads, message) in
            [(96, "launched with 96 threads, made for 64"), (33, "33 threads"), (0, "0 threads")]
        {
            let error = launch_of(&source("broken"), "no_barrier", Grid::line(1, threads)?, &args);
            assert!(error.unwrap_err().to_string().contains(message), "{threads}");
        }
        let error = launch_of(&source("broken"), "no_barrier", Grid::line(1, 64)?, &Short { a: 0 });
        assert!(error.unwrap_err().to_string().contains("its argument has 32 bytes, the launch gives 8"));

        // Parts of one array under two operands would be two arrays to a kernel.
        let whole = Tensor::zeros(8, DType::F32, &Device::Cpu)?;
        let _first = gpu.operand(&whole, "first")?;
        assert!(gpu.operand(&whole.narrow(0, 2, 4)?, "second").is_err());
        // Scratch need not be written in whole.
        let (a, scratch) = (Tensor::ones(64, DType::F32, &Device::Cpu)?, gpu.scratch(64, DType::F32)?);
        let [a, out] = [gpu.operand(&a, "a")?, gpu.operand(&scratch, "scratch")?];
        let args = Broken { a: a.address(), out: out.address(), words: 0, len: 64 };
        launch_of(&source("broken"), "unwritten_element", Grid::line(1, 64)?, &args)?;
        // A part lies in memory as it does on a GPU.
        drop(_first);
        let part = gpu.operand(&whole.narrow(0, 3, 4)?, "part")?;
        assert_eq!(part.address() % 256, 12);
        Ok(())
    })
}

args! {
    struct Convert { from: u64, to: u64, len: u64 }
}

fn converted(kernel: &str, from: Tensor, to: DType) -> Result<Tensor> {
    let gpu = Gpu::emulated().expect("within emulate");
    let len = from.elem_count();
    let out = gpu.tensor(len, to)?;
    let operands = [gpu.operand(&from, "from")?, gpu.operand(&out, "to")?];
    let args = Convert { from: operands[0].address(), to: operands[1].address(), len: len as u64 };
    launch_of(&source("definitions"), kernel, Grid::line(len.div_ceil(256), 256)?, &args)?;
    Ok(out)
}

#[test]
fn halves_are_converted_as_ieee_says() -> Result<()> {
    if emulate(Gpu::emulated).is_none() {
        return Ok(());
    }
    // Every half, and floats around every boundary between two of them.
    let every = || 0..=u16::MAX;
    let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
    let halves: Vec<f16> = every().map(f16::from_bits).collect();
    let brains: Vec<bf16> = every().map(bf16::from_bits).collect();
    let mut state = 1u64;
    let mut floats = Vec::new();
    for high in every() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let random = (state >> 40) as u32 & 0xffff;
        for low in [0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff, random] {
            floats.push(f32::from_bits(u32::from(high) << 16 | low));
        }
    }
    let (count, device) = (halves.len(), &Device::Cpu);
    let wide =
        emulate(|| converted("widen_f16", Tensor::from_vec(halves.clone(), count, device)?, DType::F32))?;
    for (half, found) in halves.iter().zip(wide.to_vec1::<f32>()?) {
        assert!(same(found, half.to_f32()), "{:04x}: {found}", half.to_bits());
    }
    let wide =
        emulate(|| converted("widen_bf16", Tensor::from_vec(brains.clone(), count, device)?, DType::F32))?;
    for (brain, found) in brains.iter().zip(wide.to_vec1::<f32>()?) {
        assert!(same(found, brain.to_f32()), "{:04x}: {found}", brain.to_bits());
    }
    let all = Tensor::from_vec(floats.clone(), floats.len(), device)?;
    let narrow = emulate(|| converted("narrow_f16", all.clone(), DType::F16))?.to_vec1::<f16>()?;
    for (float, found) in floats.iter().zip(narrow) {
        assert!(same(found.to_f32(), f16::from_f32(*float).to_f32()), "{:08x}: {found}", float.to_bits());
    }
    let narrow = emulate(|| converted("narrow_bf16", all.clone(), DType::BF16))?.to_vec1::<bf16>()?;
    for (float, found) in floats.iter().zip(narrow) {
        assert!(same(found.to_f32(), bf16::from_f32(*float).to_f32()), "{:08x}: {found}", float.to_bits());
    }
    Ok(())
}

args! {
    struct Warp { operand: u64, out: u64, operation: u32, width: u32 }
}

/// What `lane` gets, after the PTX ISA's pseudocode of `shfl.sync` and `vote.sync`.
fn defined(operation: u32, operands: &[u32], width: u32, lane: u32) -> u32 {
    let votes = (0..32).filter(|i| operands[*i as usize] != 0).fold(0u32, |votes, i| votes | 1 << i);
    let (segment, bits) = (32 - width, operands[lane as usize] & 31);
    let first = lane & segment;
    let last = first | (31 & !segment);
    let value = |lane: u32| lane * 3 + 7;
    let from = |source: i64, inside: bool| if inside { value(source as u32) } else { value(lane) };
    let (own, by) = (i64::from(lane), i64::from(bits));
    match operation {
        0 => value(first | (bits & !segment)),
        1 => from(own ^ by, (own ^ by) <= i64::from(last)),
        2 => from(own + by, own + by <= i64::from(last)),
        3 => from(own - by, own - by >= i64::from(first)),
        4 => votes,
        5 => u32::from(votes != 0),
        _ => u32::from(votes == u32::MAX),
    }
}

#[test]
fn warp_operations_follow_their_definition() -> Result<()> {
    emulate(|| {
        let Some(gpu) = Gpu::emulated() else { return Ok(()) };
        for operation in 0..7 {
            for width in [1, 2, 4, 8, 16, 32] {
                let mixed: Vec<u32> = (0..32).map(|lane| lane * 11 % 37).collect();
                for operands in [vec![0; 32], vec![1; 32], vec![16; 32], vec![31; 32], vec![33; 32], mixed] {
                    let (operand, out) =
                        (Tensor::new(&*operands, &Device::Cpu)?, gpu.tensor(32, DType::U32)?);
                    let [a, b] = [gpu.operand(&operand, "operand")?, gpu.operand(&out, "out")?];
                    let args = Warp { operand: a.address(), out: b.address(), operation, width };
                    launch_of(&source("definitions"), "warp_operation", Grid::line(1, 32)?, &args)?;
                    let expected: Vec<u32> =
                        (0..32).map(|lane| defined(operation, &operands, width, lane)).collect();
                    assert_eq!(out.to_vec1::<u32>()?, expected, "{operation} {operands:?} {width}");
                }
            }
        }
        Ok(())
    })
}

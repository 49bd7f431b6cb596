//! FP8 E4M3, the OCP "FN" kind: 1 sign, 4 exponent and 3 mantissa bits, bias 7; no infinity, NaN is 0x7F and 0xFF, the
//! largest finite value is 448. (OCP 8-bit Floating Point Specification, revision 1.0, table 1.)

/// The largest finite E4M3 value.
pub const MAX: f32 = 448.0;

/// The E4M3 code of NaN with a positive sign; 0xFF is the one with a negative sign.
pub const NAN: u8 = 0x7f;

/// True for the two NaN codes.
pub const fn is_nan(code: u8) -> bool {
    code & 0x7f == NAN
}

/// The values of all 256 codes, exact in f32.
pub const VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = value(code as u8);
        code += 1;
    }
    values
};

const fn value(code: u8) -> f32 {
    let sign = (code as u32 & 0x80) << 24;
    let magnitude = code as u32 & 0x7f;
    if magnitude == NAN as u32 {
        f32::from_bits(sign | 0x7fc0_0000)
    } else if magnitude < 8 {
        // A subnormal counts steps of 2^-9.
        let v = magnitude as f32 / 512.0;
        f32::from_bits(sign | v.to_bits())
    } else {
        // A normal number keeps its bits; the exponent bias moves from 7 to 127.
        f32::from_bits(sign | ((magnitude << 20) + (120 << 23)))
    }
}

/// The value of a code; NaN for the two NaN codes. Exact.
#[inline(always)]
pub fn decode(code: u8) -> f32 {
    VALUES[code as usize]
}

/// The code nearest to `x`: ties to even, saturating to ±448 (infinities too); NaN stays NaN with its sign.
#[inline(always)]
pub fn encode(x: f32) -> u8 {
    // Both roundings are computed and one is taken: without a branch, loops over this become vector instructions.
    let bits = x.to_bits();
    let sign = (bits >> 24) as u8 & 0x80;
    let magnitude = bits & 0x7fff_ffff;
    // 448.0 and everything above it.
    let finite = magnitude.min(0x43e0_0000);
    // Below 2^-6 the codes count steps of 2^-9: adding 2^14 leaves the rounded count in the low bits,
    // since one unit in the last place of 2^14 is 2^-9.
    let subnormal = (f32::from_bits(finite) + 16384.0).to_bits().wrapping_sub(16384f32.to_bits());
    // Else round the 23-bit mantissa to 3 bits; a carry moves into the exponent, as it should.
    let normal = ((finite + 0x7_ffff + ((finite >> 20) & 1)) >> 20).wrapping_sub(120 << 3);
    let code = if finite < 0x3c80_0000 { subnormal } else { normal };
    let code = if magnitude > 0x7f80_0000 { u32::from(NAN) } else { code };
    sign | code as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_decode() {
        for (code, value) in
            [(0x00, 0.0), (0x01, 1.0 / 512.0), (0x08, 1.0 / 64.0), (0x38, 1.0), (0x7e, 448.0), (0xfe, -448.0)]
        {
            assert_eq!(decode(code), value, "code {code:#04x}");
        }
        assert!(decode(0x7f).is_nan() && decode(0xff).is_nan());
        assert!(decode(0x80).is_sign_negative() && decode(0x80) == 0.0);
    }

    #[test]
    fn every_code_survives_a_round_trip() {
        for code in 0..=255u8 {
            assert_eq!(encode(decode(code)), code, "code {code:#04x}");
        }
    }

    #[test]
    fn ties_go_to_even_and_neighbours_to_the_nearest() {
        for low in (0..0x7e_u8).filter(|c| !is_nan(c + 1)) {
            let tie = (decode(low) + decode(low + 1)) / 2.0;
            assert_eq!(encode(tie), if low % 2 == 0 { low } else { low + 1 }, "tie above code {low:#04x}");
            assert_eq!(encode(tie.next_down()), low);
            assert_eq!(encode(tie.next_up()), low + 1);
            assert_eq!(encode(-tie.next_up()), 0x80 | (low + 1));
        }
    }

    #[test]
    fn large_values_saturate_and_nan_stays_nan() {
        for x in [448.1, 464.0, 465.0, 1e30, f32::INFINITY] {
            assert_eq!(encode(x), 0x7e);
            assert_eq!(encode(-x), 0xfe);
        }
        assert!(is_nan(encode(f32::NAN)) && is_nan(encode(-f32::NAN)));
    }
}

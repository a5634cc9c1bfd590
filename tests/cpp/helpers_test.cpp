// The tests' own 16-bit conversions, against known encodings.

#include "helpers.h"

namespace tome_test {
namespace {

TEST(Helpers, EncodesKnownValues) {
    EXPECT_EQ(encode16(1.0, kHalf), 0x3c00);
    EXPECT_EQ(encode16(-2.0, kHalf), 0xc000);
    EXPECT_EQ(encode16(65504.0, kHalf), 0x7bff);
    EXPECT_EQ(encode16(65520.0, kHalf), 0x7c00);               // halfway to 2^16: infinity
    EXPECT_EQ(encode16(std::ldexp(1.0, -24), kHalf), 0x0001);  // the smallest
    EXPECT_EQ(encode16(std::ldexp(1.0, -25), kHalf), 0x0000);  // a tie, to even
    EXPECT_EQ(encode16(1.0 + std::ldexp(1.0, -11), kHalf), 0x3c00);
    EXPECT_EQ(encode16(1.0 + 3 * std::ldexp(1.0, -11), kHalf), 0x3c02);
    EXPECT_EQ(encode16(1.0, kBFloat), 0x3f80);
    EXPECT_EQ(encode16(-kInf, kBFloat), 0xff80);
    EXPECT_EQ(encode16(kNaN, kBFloat), 0x7fc0);
}

TEST(Helpers, DecodesWhatItEncodes) {
    for (Format16 format : {kHalf, kBFloat}) {
        for (int bits = 0; bits < 0x10000; ++bits) {
            const double value = decode16(static_cast<uint16_t>(bits), format);
            if (std::isnan(value)) continue;
            ASSERT_EQ(encode16(value, format), bits);
        }
    }
}

}  // namespace
}  // namespace tome_test

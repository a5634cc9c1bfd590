// The matrix units of AMX: eight tile registers, t0 to t7, of 16 rows of 64 bytes, and products of
// two of them in bfloat16, which are added to a third in float32.
//
//                             right tile: 16 pairs x 16 columns
//                             (rows 2p and 2p + 1 of a column lie in one 32-bit lane)
//                            +--------------+
//   left tile:               |              |
//   16 rows x 32 values      |              |
//   +--------------+         +--------------+
//   |              |    x                        added to   16 rows x 16 float32
//   +--------------+
//
// Each instruction has a body in plain C++ beside it, which runs where TOME_X86_AMX is not defined:
// so the kernels made of them are tested on machines without such units, too.
#ifndef TOME_AMX_INL
#define TOME_AMX_INL

#include "panels.inl"

namespace tome::TOME_ISA_NAMESPACE {

constexpr int64_t kUnitRows = 16;      // of a tile, and columns of a right tile or a result
constexpr int64_t kUnitDepth = 32;     // values of a left tile's row, and rows of a right tile
constexpr int64_t kUnitBytes = 1024;   // of a tile
constexpr int64_t kUnitRowBytes = 64;  // of a tile's row

#if !defined(TOME_X86_AMX)
struct PlainTile {
    alignas(64) char bytes[kUnitBytes];
};
inline thread_local PlainTile plain_tiles[8];
#endif

// While there is one, this thread's tile registers are those of the figure, whole. Without one, an
// instruction ends the program; another library's shape of tiles is lost, so every kernel has one.
class UseTiles {
  public:
#if defined(TOME_X86_AMX)
    UseTiles() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = kUnitRowBytes;
            config.rows[tile] = kUnitRows;
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~UseTiles() { asm volatile("tilerelease" ::: "memory"); }
#else
    UseTiles() {}
#endif
    UseTiles(const UseTiles&) = delete;
    UseTiles& operator=(const UseTiles&) = delete;
};

template <int kTile>
TOME_INLINE void clear_tile() {
#if defined(TOME_X86_AMX)
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
#else
    plain_tiles[kTile] = {};
#endif
}

// From or to rows of 64 bytes that lie row_bytes apart.
template <int kTile>
TOME_INLINE void load_tile(const void* rows, int64_t row_bytes) {
#if defined(TOME_X86_AMX)
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(kTile)
                 : "memory");
#else
    for (int64_t i = 0; i < kUnitRows; ++i) {
        std::memcpy(plain_tiles[kTile].bytes + i * kUnitRowBytes,
                    static_cast<const char*>(rows) + i * row_bytes, kUnitRowBytes);
    }
#endif
}

template <int kTile>
TOME_INLINE void store_tile(void* rows, int64_t row_bytes) {
#if defined(TOME_X86_AMX)
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(row_bytes), "i"(kTile)
                 : "memory");
#else
    for (int64_t i = 0; i < kUnitRows; ++i) {
        std::memcpy(static_cast<char*>(rows) + i * row_bytes,
                    plain_tiles[kTile].bytes + i * kUnitRowBytes, kUnitRowBytes);
    }
#endif
}

// kSum += kLeft x kRight. Subnormal values count as 0.
template <int kSum, int kLeft, int kRight>
TOME_INLINE void multiply_add_tiles() {
#if defined(TOME_X86_AMX)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kLeft), "i"(kRight));
#else
    // As the instruction does it: even and odd rows are summed apart. Products are exact.
    const auto value = [](int tile, int64_t row, int64_t i) TOME_INLINE_LAMBDA {
        uint16_t bits;
        std::memcpy(&bits, plain_tiles[tile].bytes + row * kUnitRowBytes + 2 * i, sizeof(bits));
        const bool subnormal = (bits & 0x7f80u) == 0;
        return bit_cast<float>(uint32_t{subnormal ? bits & 0x8000u : bits} << 16);
    };
    for (int64_t i = 0; i < kUnitRows; ++i) {
        for (int64_t j = 0; j < kUnitRows; ++j) {
            float even = 0, odd = 0;
            for (int64_t p = 0; p < kUnitDepth / 2; ++p) {
                even += value(kLeft, i, 2 * p) * value(kRight, p, 2 * j);
                odd += value(kLeft, i, 2 * p + 1) * value(kRight, p, 2 * j + 1);
            }
            char* at = plain_tiles[kSum].bytes + i * kUnitRowBytes + 4 * j;
            float sum;
            std::memcpy(&sum, at, sizeof(sum));
            sum += even + odd;
            std::memcpy(at, &sum, sizeof(sum));
        }
    }
#endif
}

// --- products of matrices ---

// How a matrix lies whose tiles are (groups of 16 rows, steps of 32 values), as a left factor.
struct LeftTiles {
    const void* data;
    int64_t row_bytes, group_bytes, step_bytes;

    const char* at(int64_t group, int64_t step) const {
        return static_cast<const char*>(data) + group * group_bytes + step * step_bytes;
    }
};

// The same of a right factor: (groups of 16 columns, steps of 32 values), each tile on its own.
struct RightTiles {
    const void* data;
    int64_t steps;  // from group to group

    const char* at(int64_t group, int64_t step) const {
        return static_cast<const char*>(data) + (group * steps + step) * kUnitBytes;
    }
};

// (16 kLeft, 16 kRight) results, out_step apart: left x right over `steps`, added to what is there
// if `add`. Two of either share each load.
template <int kLeft, int kRight>
TOME_INLINE void multiply_tiles(LeftTiles left, RightTiles right, int64_t steps, bool add,
                                float* out, int64_t out_step) {
    static_assert(kLeft <= 2 && kRight <= 2, "4 results and 2 of either factor are 8 tiles");
    const int64_t out_bytes = out_step * 4;
    float* const below = out + kUnitRows * out_step;
    if (add) {
        load_tile<0>(out, out_bytes);
        if constexpr (kRight == 2) load_tile<1>(out + kUnitRows, out_bytes);
        if constexpr (kLeft == 2) load_tile<2>(below, out_bytes);
        if constexpr (kLeft == 2 && kRight == 2) load_tile<3>(below + kUnitRows, out_bytes);
    } else {
        clear_tile<0>();
        if constexpr (kRight == 2) clear_tile<1>();
        if constexpr (kLeft == 2) clear_tile<2>();
        if constexpr (kLeft == 2 && kRight == 2) clear_tile<3>();
    }
    for (int64_t s = 0; s < steps; ++s) {
        load_tile<4>(left.at(0, s), left.row_bytes);
        load_tile<6>(right.at(0, s), kUnitRowBytes);
        multiply_add_tiles<0, 4, 6>();
        if constexpr (kRight == 2) {
            load_tile<7>(right.at(1, s), kUnitRowBytes);
            multiply_add_tiles<1, 4, 7>();
        }
        if constexpr (kLeft == 2) {
            load_tile<5>(left.at(1, s), left.row_bytes);
            multiply_add_tiles<2, 5, 6>();
            if constexpr (kRight == 2) multiply_add_tiles<3, 5, 7>();
        }
    }
    store_tile<0>(out, out_bytes);
    if constexpr (kRight == 2) store_tile<1>(out + kUnitRows, out_bytes);
    if constexpr (kLeft == 2) store_tile<2>(below, out_bytes);
    if constexpr (kLeft == 2 && kRight == 2) store_tile<3>(below + kUnitRows, out_bytes);
}

// As multiply_tiles, for any number of groups of columns, and one or two of rows.
inline void multiply_groups(LeftTiles left, int64_t left_groups, RightTiles right,
                            int64_t right_groups, int64_t steps, bool add, float* out,
                            int64_t out_step) {
    for (int64_t j = 0; j < right_groups; j += 2) {
        const RightTiles from{right.at(j, 0), right.steps};
        float* to = out + j * kUnitRows;
        const bool two = j + 1 < right_groups;
        if (left_groups == 2) {
            two ? multiply_tiles<2, 2>(left, from, steps, add, to, out_step)
                : multiply_tiles<2, 1>(left, from, steps, add, to, out_step);
        } else {
            two ? multiply_tiles<1, 2>(left, from, steps, add, to, out_step)
                : multiply_tiles<1, 1>(left, from, steps, add, to, out_step);
        }
    }
}

// --- packing ---

// 32-bit lanes that hold two bfloat16 are moved as floats: no arithmetic touches them.
using UnitRow = typename Vector<float>::Type;
static_assert(sizeof(UnitRow) == kUnitRowBytes, "a row of a tile is a vector");

// Tokens (count, dim) of bfloat16, some of which are read as zeros: those behind the last, and
// those whose bias is -inf, as their weights are 0, but 0 times a NaN or an infinity would be NaN.
struct UnitTokens {
    const BFloat* data;
    int64_t step, count, dim;
    const float* bias = nullptr;  // (count), or nullptr for none hidden

    // Channels [d, d + 32) of a token; zeros behind the last.
    TOME_INLINE UnitRow channels(int64_t token, int64_t d) const {
        const bool none =
            token >= count || d >= dim ||
            (bias != nullptr && bias[token] == -std::numeric_limits<float>::infinity());
        if (none) return UnitRow{};
        const BFloat* from = data + token * step + d;
        if (d + kUnitDepth <= dim) return load_raw<UnitRow>(from);
        BFloat part[kUnitDepth] = {};
        std::memcpy(static_cast<void*>(part), from, static_cast<size_t>(dim - d) * sizeof(BFloat));
        return load_raw<UnitRow>(part);
    }
};

constexpr int64_t unit_groups(int64_t count) { return (count + kUnitRows - 1) / kUnitRows; }
constexpr int64_t unit_steps(int64_t depth) { return (depth + kUnitDepth - 1) / kUnitDepth; }

// A square of 16 x 16 lanes, in place: row i becomes column i.
TOME_INLINE void transpose_unit(UnitRow (&square)[kUnitRows]) {
#if !defined(__clang__)
    transpose_square<float>(square);
#else
    UnitRow columns[kUnitRows];
    for (int i = 0; i < kUnitRows; ++i) {
        for (int j = 0; j < kUnitRows; ++j) columns[j][i] = square[i][j];
    }
    for (int i = 0; i < kUnitRows; ++i) square[i] = columns[i];
#endif
}

struct Halves {
    VNarrow of[2];
};

// Two bfloat16 in each lane.
TOME_INLINE UnitRow in_pairs(VNarrow first, VNarrow second) {
    return bit_cast<UnitRow>(widen(first) | widen(second) << 16);
}

// 32 values, rounded to the nearest.
TOME_INLINE void store_two(BFloat* to, VFloat low, VFloat high) {
#if defined(TOME_X86_BF16)
    const auto row =
        bit_cast<UnitRow>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(high), bit_cast<__m512>(low)));
#else
    const auto row = bit_cast<UnitRow>(Halves{{round_to_bfloat(low), round_to_bfloat(high)}});
#endif
    __builtin_memcpy(to, &row, sizeof(row));
}

TOME_INLINE void store_row(void* to, UnitRow row) { __builtin_memcpy(to, &row, sizeof(row)); }

// tokens -> out (groups of tokens, steps of channels), left tiles on their own.
inline void pack_left(const UnitTokens& tokens, int64_t groups, char* out) {
    const int64_t steps = unit_steps(tokens.dim);
    for (int64_t token = 0; token < groups * kUnitRows; ++token) {
        for (int64_t s = 0; s < steps; ++s) {
            char* tile = out + (token / kUnitRows * steps + s) * kUnitBytes;
            store_row(tile + token % kUnitRows * kUnitRowBytes,
                      tokens.channels(token, s * kUnitDepth));
        }
    }
}

// tokens -> out (groups of tokens, steps of channels), right tiles: tokens are the columns.
inline void pack_columns_right(const UnitTokens& tokens, int64_t groups, char* out) {
    for (int64_t group = 0; group < groups; ++group) {
        for (int64_t s = 0; s < unit_steps(tokens.dim); ++s, out += kUnitBytes) {
            UnitRow square[kUnitRows];
            for (int i = 0; i < kUnitRows; ++i) {
                square[i] = tokens.channels(group * kUnitRows + i, s * kUnitDepth);
            }
            transpose_unit(square);
            for (int i = 0; i < kUnitRows; ++i) store_row(out + i * kUnitRowBytes, square[i]);
        }
    }
}

// tokens -> out (groups of channels, steps of tokens), right tiles: channels are the columns.
inline void pack_rows_right(const UnitTokens& tokens, int64_t steps, char* out) {
    const int64_t groups = unit_groups(tokens.dim);
    for (int64_t pair = 0; pair < steps * kUnitRows; ++pair) {
        char* row = out + pair / kUnitRows * kUnitBytes + pair % kUnitRows * kUnitRowBytes;
        for (int64_t d = 0; d < groups * kUnitRows; d += kUnitDepth) {
            // Two neighbours of a channel in one lane: those of 16 channels fill a row.
            const auto even = bit_cast<Halves>(tokens.channels(2 * pair, d));
            const auto odd = bit_cast<Halves>(tokens.channels(2 * pair + 1, d));
            for (int half = 0; half < 2; ++half) {
                const int64_t group = d / kUnitRows + half;
                if (group == groups) break;
                store_row(row + group * steps * kUnitBytes, in_pairs(even.of[half], odd.of[half]));
            }
        }
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_AMX_INL

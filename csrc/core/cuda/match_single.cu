// match of one head, as guided merging and diffusion models have it: tokens of many channels, which
// tensor cores multiply as they are.
//
// Rows are not staged. What there is to do about their length is done to the scores:
//
//   score = (a . b) / |b| / |a|
//
// A product of two 16-bit elements is exact in float32, so one mma says what staged rows need three
// for; of float32, six products of bfloat16 say it. Shared memory holds a part of the channels at a
// time, however many there are.
#include "match_blocks.cuh"
#include "match_kernels.h"
#include "match_rows.cuh"

namespace tome::match_cuda_detail {
namespace {

using match_tiles::kSingleRowBytes;
using match_tiles::kThreads;

constexpr int kPieces = kSingleRowBytes / 16;    // of 16 bytes, in a row of a part
constexpr int kRowsAtOnce = kThreads / kPieces;  // that a block copies
constexpr int kWarpsDown = 2, kWarpsAcross = 4;  // over a tile
constexpr int kWarps = kThreads / device::kWarp;
static_assert(kWarpsDown * kWarpsAcross == kWarps);

// Rows of float32 and bfloat16 with squares outside of this are looked at closer, and scaled by a
// power of two if their largest element is outside of that: float32 might hold no product of
// theirs.
constexpr float kLeastSquare = 0x1p-60f, kMostSquare = 0x1p80f;
constexpr float kLeastElement = 0x1p-40f, kMostElement = 0x1p40f;

// Where a row has a piece. Pieces change places with others in the same eight rows: neither eight
// lanes that copy a row, nor ldmatrix, which reads a column of eight, nor four pieces of two rows
// meet a bank twice.
__device__ __forceinline__ int place_of(int row, int piece) {
    return (piece ^ (row % 2 * 4 + row % kPieces / 2)) * 16;
}

// A tile's rows in shared memory: those of A are 0 to kRows - 1, those of B follow.
template <class In, int kRows, int kParts>
struct Tile {
    static constexpr match_tiles::SingleLayout kLayout = match_tiles::single_layout(kRows, kParts);
    static constexpr int kTurns = 2 * kRows / kRowsAtOnce;  // of a thread, to copy a part
    static constexpr int kPartBytes = 2 * kRows * kSingleRowBytes;
    static constexpr int kCount = 16 / sizeof(In);  // channels of a piece
    // Groups of 16 rows, of A or of B, whose squares a warp sums.
    static constexpr int kOwn = 2 * kRows / kRowStep / kWarps;

    unsigned char* parts;
    Packed* best;     // (kWarpsAcross + 1, kRows): of this tile, and of those before it
    int32_t* tokens;  // -1: none, or one that takes no part
    float* inverse;   // 1 / length, after scale; NaN of a token that takes no part
    float* scale;     // a power of two

    __device__ explicit Tile(unsigned char* shared)
        : parts(shared),
          best(reinterpret_cast<Packed*>(shared + kLayout.best)),
          tokens(reinterpret_cast<int32_t*>(shared + kLayout.tokens)),
          inverse(reinterpret_cast<float*>(shared + kLayout.inverse)),
          scale(reinterpret_cast<float*>(shared + kLayout.scale)) {}

    // Row and piece that this thread copies.
    __device__ static int row_of(int turn) {
        return turn * kRowsAtOnce + static_cast<int>(threadIdx.x) / kPieces;
    }
    __device__ static int piece() { return static_cast<int>(threadIdx.x) % kPieces; }
};

// Which tokens are a tile's rows of A or B.
//   tokens (kRows) shared, out
template <int kRows, class Set>
__device__ __forceinline__ void list_tokens(const Set& set, int64_t count, int32_t* tokens) {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kRows) return;
    tokens[i] = i < count && set.takes_part(i) ? static_cast<int32_t>(set.token(i)) : -1;
}

// 16 bytes of a row, zeros past the last channel, multiplied by a power of two.
template <class In>
__device__ __forceinline__ uint4 load_scaled(const In* x, int64_t left, float scale) {
    constexpr int kCount = 16 / sizeof(In);
    device::Vector<In, kCount> values;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        values.v[i] = device::narrow<In>(i < left ? device::widen(x[i]) * scale : 0.0f);
    }
    return device::as_word(values);
}

// Where this thread begins to copy rows of A and of B that are every second token.
template <class In>
struct Begins {
    const In *a, *b;
    int count_a, count_b;
};

// Starts to bring a part of the channels. Rows without a token are zeros.
template <class In, int kRows, int kParts, bool kListed>
__device__ __forceinline__ void start_part(const Tile<In, kRows, kParts>& tile, const MatchArgs& m,
                                           const In* metric, const Begins<In>& begins, int part,
                                           bool scaled) {
    using T = Tile<In, kRows, kParts>;
    constexpr int kHalf = T::kTurns / 2;
    unsigned char* to = tile.parts + part % kParts * T::kPartBytes +
                        T::row_of(0) * kSingleRowBytes + place_of(T::row_of(0), T::piece());
    const int64_t offset = int64_t{part} * kPieces * T::kCount;  // of channels
    const int64_t channel = offset + T::piece() * T::kCount;
    constexpr int kTurnBytes = kRowsAtOnce * kSingleRowBytes;  // whole eights of rows
    if (!m.by_vectors || scaled) {
#pragma unroll 1
        for (int turn = 0; turn < T::kTurns; ++turn) {
            const int row = T::row_of(turn);
            const int32_t token = tile.tokens[row];
            const bool valid = token >= 0 && channel < m.p.dim;
            *reinterpret_cast<uint4*>(to + turn * kTurnBytes) =
                load_scaled(metric + (valid ? token * m.p.stride_token + channel : 0),
                            valid ? m.p.dim - channel : 0, scaled ? tile.scale[row] : 1.0f);
        }
        return;
    }
    const In* from = begins.a + offset;
#pragma unroll
    for (int turn = 0; turn < T::kTurns; ++turn) {
        bool valid = channel < m.p.dim;
        if constexpr (kListed) {
            const int32_t token = tile.tokens[T::row_of(turn)];
            valid &= token >= 0;
            from = metric + (token * m.p.stride_token + channel);
        } else {
            if (turn == kHalf) from = begins.b + offset;
            valid &= T::row_of(turn % kHalf) < (turn < kHalf ? begins.count_a : begins.count_b);
        }
        // What isn't valid is not read, but must be an address.
        device::cp_async_16<true>(to + turn * kTurnBytes, valid ? from : metric, valid);
        if constexpr (!kListed) from += 2 * kRowsAtOnce * m.p.stride_token;
    }
}

// One part's products: a warp has kDown groups of 16 rows and kAcross of 16 columns. And the
// squares of kOwn groups: each of a lane's is of two rows, g and g + 8, and of its channels alone.
//   rows_a, rows_b, own  the part's rows, from the warp's first on
//   acc [i][2 j + h][..]: rows of group i, columns 8 h to 8 h + 7 of group j; as mma leaves them
template <class In, int kDown, int kAcross, int kOwn>
__device__ __forceinline__ void multiply(const unsigned char* rows_a, const unsigned char* rows_b,
                                         const unsigned char* own,
                                         float (&acc)[kDown][2 * kAcross][4],
                                         float (&squares)[kOwn][2]) {
    constexpr int kGroupBytes = kRowStep * kSingleRowBytes;
    const int lane = static_cast<int>(threadIdx.x) % device::kWarp;
    const int row = lane % 8, matrix = lane / 8;
    const int row_a = (matrix % 2 * 8 + row) * kSingleRowBytes;
    rows_a += row_a;
    own += row_a;
    rows_b += (matrix / 2 * 8 + row) * kSingleRowBytes;
#pragma unroll 1
    for (int step = 0; step < kPieces / 2; ++step) {
        const int place_a = place_of(row, 2 * step + matrix / 2);
        const int place_b = place_of(row, 2 * step + matrix % 2);
        uint32_t b[kAcross][4];
#pragma unroll
        for (int j = 0; j < kAcross; ++j) {
            device::ldmatrix_x4(b[j], rows_b + j * kGroupBytes + place_b);
        }
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
            uint32_t a[4];
            device::ldmatrix_x4(a, rows_a + i * kGroupBytes + place_a);
#pragma unroll
            for (int j = 0; j < 2 * kAcross; ++j) {
                const uint32_t columns[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                device::mma_m16n8k16<In>(acc[i][j], a, columns);
            }
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            uint32_t values[4];
            device::ldmatrix_x4(values, own + i * kGroupBytes + place_a);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float value = device::unpack<In>(values[k / 2], k % 2);
                float& square = squares[i][k / 2 % 2];
                square = __fmaf_rn(value, value, square);
            }
        }
    }
}

// Three bfloat16 that add up to a float32 but for 2^-27 of it, of two floats: parts[i] is the i-th
// of both.
__device__ __forceinline__ void split_in_three(float x, float y, uint32_t (&parts)[3]) {
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        parts[i] = device::narrow_pair<BFloat>(x, y);
        x -= device::unpack<BFloat>(parts[i], 0);
        y -= device::unpack<BFloat>(parts[i], 1);
    }
}

// The same of float32. Lane t of four takes channels 4 t to 4 t + 3 for its k = 2t, 2t + 1, 2t + 8
// and 2t + 9: a piece, of both sides. Of the nine products of parts those of 2^-25 and less are
// left out; small ones come first.
template <int kDown, int kAcross, int kOwn>
__device__ __forceinline__ void multiply_floats(const unsigned char* rows_a,
                                                const unsigned char* rows_b,
                                                const unsigned char* own,
                                                float (&acc)[kDown][2 * kAcross][4],
                                                float (&squares)[kOwn][2]) {
    constexpr int kOfA[] = {2, 0, 1, 1, 0, 0}, kOfB[] = {0, 2, 1, 0, 1, 0};
    constexpr int kGroupBytes = kRowStep * kSingleRowBytes;
    const int lane = static_cast<int>(threadIdx.x) % device::kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int step = 0; step < kPieces / 4; ++step) {
        const int place = g * kSingleRowBytes + place_of(g, 4 * step + t);
        const auto piece_of = [&](const unsigned char* rows, int eight) {
            const auto* at = rows + eight * 8 * kSingleRowBytes + place;
            return device::as_vector<float, 4>(*reinterpret_cast<const uint4*>(at));
        };
        uint32_t b[3][2 * kAcross][2];
#pragma unroll
        for (int j = 0; j < 2 * kAcross; ++j) {
            const auto x = piece_of(rows_b, j);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                uint32_t parts[3];
                split_in_three(x.v[2 * k], x.v[2 * k + 1], parts);
#pragma unroll
                for (int part = 0; part < 3; ++part) b[part][j][k] = parts[part];
            }
        }
#pragma unroll
        for (int i = 0; i < kDown; ++i) {
            uint32_t a[3][4];
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const auto x = piece_of(rows_a + i * kGroupBytes, lower);
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    uint32_t parts[3];
                    split_in_three(x.v[2 * k], x.v[2 * k + 1], parts);
#pragma unroll
                    for (int part = 0; part < 3; ++part) a[part][2 * k + lower] = parts[part];
                }
            }
            // One product for all columns, then the next: none waits for the one before it.
#pragma unroll
            for (int product = 0; product < 6; ++product) {
#pragma unroll
                for (int j = 0; j < 2 * kAcross; ++j) {
                    device::mma_m16n8k16<BFloat>(acc[i][j], a[kOfA[product]], b[kOfB[product]][j]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const auto x = piece_of(own + i * kGroupBytes, lower);
#pragma unroll
                for (const float& value : x.v) {
                    squares[i][lower] = __fmaf_rn(value, value, squares[i][lower]);
                }
            }
        }
    }
}

// Sums of squares over the four lanes that have a row, and what they mean.
//   first    the warp's own first row
//   returns  whether a row has to be scaled, or may have to be
template <class In, int kRows, int kParts>
__device__ __forceinline__ bool take_lengths(const Tile<In, kRows, kParts>& tile, int first,
                                             float (&squares)[Tile<In, kRows, kParts>::kOwn][2]) {
    const int lane = static_cast<int>(threadIdx.x) % device::kWarp;
    bool unsure = false;
#pragma unroll
    for (int i = 0; i < 2 * Tile<In, kRows, kParts>::kOwn; ++i) {
        const int row = first + 8 * i + lane / 4;
        float square = squares[i / 2][i % 2];
        square += __shfl_xor_sync(kFullMask, square, 1);
        square += __shfl_xor_sync(kFullMask, square, 2);
        const bool exists = tile.tokens[row] >= 0;
        // A row of zeros has a score of 0 with every other; one with infinity or NaN has none.
        const float inverse = square == 0.0f ? 1.0f : 1.0f / sqrtf(square);
        const bool usable = exists && square <= 3.402823466e38f;
        if (lane % 4 == 0) tile.inverse[row] = usable ? inverse : __uint_as_float(0x7fffffffu);
        unsure |= exists && !(square >= kLeastSquare && square <= kMostSquare);
    }
    return unsure;
}

// Powers of two for rows of which float32 can't hold the squares; 1 for all others.
//   returns  whether one of this thread's rows has another than 1
template <class In, int kRows, int kParts>
__device__ __forceinline__ bool take_scales(const Tile<In, kRows, kParts>& tile, const MatchArgs& m,
                                            const In* metric, bool of_a) {
    using T = Tile<In, kRows, kParts>;
    bool any = false;
#pragma unroll 1
    for (int turn = of_a ? 0 : T::kTurns / 2; turn < T::kTurns; ++turn) {
        const int row = T::row_of(turn);
        const int32_t token = tile.tokens[row];
        uint32_t largest = 0;  // as bits, where NaN and infinity are largest of all
        for (int64_t c = T::piece(); token >= 0 && c < m.p.dim; c += kPieces) {
            const float value = device::widen(metric[token * m.p.stride_token + c]);
            const uint32_t size = __float_as_uint(value) & 0x7fffffffu;
            largest = size > largest ? size : largest;
        }
        largest = over_row_lanes(largest, [](uint32_t x, uint32_t y) { return x < y ? y : x; });
        const float value = __uint_as_float(largest);
        const bool stays = largest == 0 || largest >= 0x7f800000u ||
                           (value >= kLeastElement && value <= kMostElement);
        const float scale = stays ? 1.0f : scale_for(value);
        if (T::piece() == 0) tile.scale[row] = scale;
        any |= !stays;
    }
    return any;
}

// A tile of a block (see Place), from its channels to its rows' lengths and products.
//   tokens of all rows are listed, and of scaled tiles scales are known; ends with a barrier
//   first_row, first_column  of the warp
//   returns                  whether a row of this thread may have to be scaled
template <class In, int kRows, int kParts, bool kListed, int kDown, int kAcross>
__device__ __forceinline__ bool pass_over_channels(const Tile<In, kRows, kParts>& tile,
                                                   const MatchArgs& m, const In* metric,
                                                   const Begins<In>& begins, int first_row,
                                                   int first_column, bool scaled,
                                                   float (&acc)[kDown][2 * kAcross][4]) {
    using T = Tile<In, kRows, kParts>;
    constexpr int kChannels = kPieces * T::kCount;
    const auto parts = static_cast<int>(m.p.dim == 0 ? 1 : (m.p.dim - 1) / kChannels + 1);
    const int first_own = static_cast<int>(threadIdx.x) / device::kWarp * T::kOwn * kRowStep;
    float squares[T::kOwn][2] = {};
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < 2 * kAcross; ++j) {
#pragma unroll
            for (float& value : acc[i][j]) value = 0.0f;
        }
    }
#pragma unroll 1
    for (int part = 0; part < kParts - 1; ++part) {
        if (part < parts) {
            start_part<In, kRows, kParts, kListed>(tile, m, metric, begins, part, scaled);
        }
        device::cp_async_commit();
    }
#pragma unroll 1
    for (int part = 0; part < parts; ++part) {
        device::cp_async_wait<kParts - 2>();
        __syncthreads();
        // Where the part before this one was.
        const int next = part + kParts - 1;
        if (next < parts) {
            start_part<In, kRows, kParts, kListed>(tile, m, metric, begins, next, scaled);
        }
        device::cp_async_commit();
        const unsigned char* at = tile.parts + part % kParts * T::kPartBytes;
        const unsigned char* rows_a = at + first_row * kSingleRowBytes;
        const unsigned char* rows_b = at + (kRows + first_column) * kSingleRowBytes;
        const unsigned char* own = at + first_own * kSingleRowBytes;
        if constexpr (sizeof(In) == 4) {
            multiply_floats<kDown, kAcross, T::kOwn>(rows_a, rows_b, own, acc, squares);
        } else {
            multiply<In, kDown, kAcross, T::kOwn>(rows_a, rows_b, own, acc, squares);
        }
    }
    const bool unsure = take_lengths(tile, first_own, squares);
    __syncthreads();
    return unsure;
}

// Two blocks to a multiprocessor, which with large tiles leaves a thread 128 registers. float32
// takes more; and where a multiprocessor has 100 KiB large tiles fit none, and are never launched.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocksOfLarge = 1;
#else
constexpr int kBlocksOfLarge = 2;
#endif

template <class In, int kRows, int kParts, bool kListed>
__global__ void __launch_bounds__(kThreads, sizeof(In) == 4                    ? 1
                                            : kRows == match_tiles::kLargeRows ? kBlocksOfLarge
                                                                               : 2)
    match_single_kernel(const __grid_constant__ MatchArgs m) {
    device::wait_for_earlier_kernels();
    device::let_next_kernel_begin();  // merge: see match.cu
    constexpr bool kMayScale = !std::is_same_v<In, Half>;
    constexpr int kDown = kRows / kWarpsDown / kRowStep, kAcross = kRows / kWarpsAcross / kRowStep;
    const Place place(m);
    unsigned char* shared = device::dynamic_shared();
    const Tile<In, kRows, kParts> tile(shared);
    const int thread = static_cast<int>(threadIdx.x), warp = thread / device::kWarp;
    const int lane = thread % device::kWarp, g = lane / 4, t = lane % 4;
    const int first_row = warp / kWarpsAcross * kDown * kRowStep;
    const int first_column = warp % kWarpsAcross * kAcross * kRowStep;

    const auto* metric = static_cast<const In*>(m.p.metric) + place.image * m.p.stride_batch;
    using Set = RowsOf<kListed>;
    const Set set_a(m, place.image, true, int64_t{place.first_group_a} * kRowStep);
    list_tokens<kRows>(set_a, place.count_a, tile.tokens);
    using T = Tile<In, kRows, kParts>;
    const auto begin_of = [&](const Set& set) {
        return metric + (set.token(T::row_of(0)) * m.p.stride_token + T::piece() * T::kCount);
    };
    Begins<In> begins{metric, metric, place.count_a, 0};
    if constexpr (!kListed) begins.a = begin_of(set_a);
    if (thread < kRows) tile.best[kWarpsAcross * kRows + thread] = 0;
    bool scaled = false;
    for (int step = place.first_tile; step < place.past_tile; ++step) {
        const int64_t begin_b = int64_t{step} * m.tiles.rows_b, left_b = m.sets.num_b - begin_b;
        const Set set_b(m, place.image, false, begin_b);
        begins.count_b = static_cast<int>(left_b < m.tiles.rows_b ? left_b : m.tiles.rows_b);
        if constexpr (!kListed) begins.b = begin_of(set_b);
        list_tokens<kRows>(set_b, begins.count_b, tile.tokens + kRows);
        __syncthreads();
        float acc[kDown][2 * kAcross][4];
        if (kMayScale && scaled) {
            take_scales(tile, m, metric, false);
            __syncthreads();
        }
        for (;;) {
            const bool unsure = pass_over_channels<In, kRows, kParts, kListed, kDown, kAcross>(
                tile, m, metric, begins, first_row, first_column, scaled, acc);
            if (!kMayScale || scaled || !__syncthreads_or(unsure)) break;
            // Hardly ever: once more.
            scaled = __syncthreads_or(take_scales(tile, m, metric, true)) != 0;
            if (!scaled) break;
        }

#pragma unroll
        for (int i = 0; i < kDown; ++i) {
#pragma unroll
            for (int lower = 0; lower < 2; ++lower) {
                const int row = first_row + i * kRowStep + 8 * lower + g;
                const float inverse = tile.inverse[row];
                float top_score = -INFINITY;
                int top_column = 0;
#pragma unroll
                for (int j = 0; j < 2 * kAcross; ++j) {
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        const int column = first_column + 8 * j + 2 * t + k;
                        const float score = __fmul_rn(
                            __fmul_rn(acc[i][j][2 * lower + k], tile.inverse[kRows + column]),
                            inverse);
                        // Strictly greater: among equals the earlier column stays.
                        if (score > top_score) {
                            top_score = score;
                            top_column = column;
                        }
                    }
                }
                const Packed top =
                    best_of_lanes(top_score, static_cast<int32_t>(begin_b) + top_column);
                if (t == 0) tile.best[warp % kWarpsAcross * kRows + row] = top;
            }
        }
        __syncthreads();
        if (thread < place.count_a) {  // in shared memory, because registers are short
            Packed top = 0;
#pragma unroll
            for (int i = 0; i <= kWarpsAcross; ++i) {
                top = larger(top, tile.best[i * kRows + thread]);
            }
            tile.best[kWarpsAcross * kRows + thread] = top;
        }
    }
    const Packed mine = thread < kRows ? tile.best[kWarpsAcross * kRows + thread] : 0;
    // Its place anew: kept over the tiles it would take registers.
    finish_block<kListed>(m, Place(m, device::forget_origin(blockIdx.x)), mine, shared);
}

template <class In, int kRows, int kParts>
cudaError_t launch_tiles(const MatchArgs& given, dim3 grid, cudaStream_t stream) {
    MatchArgs m = given;
    m.by_vectors = vectors_serve<In>(m.p);
    const auto kernel = m.listed() ? match_single_kernel<In, kRows, kParts, true>
                                   : match_single_kernel<In, kRows, kParts, false>;
    return launch_only_kernel(kernel, m, grid, stream);
}

template <class In>
cudaError_t launch_of(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    using namespace match_tiles;
    return m.tiles.buffers == kLargeParts
               ? launch_tiles<In, kLargeRows, kLargeParts>(m, grid, stream)
               : launch_tiles<In, kSmallRows, kSmallParts>(m, grid, stream);
}

}  // namespace

cudaError_t launch_match_single(const MatchArgs& m, dim3 grid, cudaStream_t stream) {
    switch (m.p.dtype) {
        case DType::kFloat16:
            return launch_of<Half>(m, grid, stream);
        case DType::kBFloat16:
            return launch_of<BFloat>(m, grid, stream);
        case DType::kFloat32:
            return launch_of<float>(m, grid, stream);
        case DType::kFloat64:
            break;
    }
    return cudaErrorInvalidValue;
}

}  // namespace tome::match_cuda_detail

// The nearest B token of every A token: a matrix product that keeps only its row maxima.
//
// Set B is packed into the panels of panels.inl, in L2; a tile of A tokens, in L1, passes over
// them. When a panel is done, each lane keeps the largest sum it has seen and the column it came
// from. The scores themselves are never written. As each is one chain of multiply-adds, equal
// tokens score equally and an image's result does not depend on its neighbours or the threads.
#ifndef TOME_MATCH_INL
#define TOME_MATCH_INL

#include "panels.inl"

namespace tome::TOME_ISA_NAMESPACE {

constexpr int64_t kTokensAhead = 2;  // of the same set: enough to cover the latency of memory

// Rows whose squares overflow, vanish, or are not numbers. Returns false, and zeros, for the last.
template <class T>
bool normalise_extreme(T* row, int64_t dim) {
    T largest = 0;
    bool finite = true;
    for (int64_t d = 0; d < dim; ++d) {
        finite &= std::isfinite(row[d]);
        largest = std::max(largest, std::abs(row[d]));
    }
    if (!finite || largest == 0) {
        std::fill(row, row + dim, T(0));
        return finite;
    }
    T square = 0;
    for (int64_t d = 0; d < dim; ++d) {
        row[d] /= largest;
        square += row[d] * row[d];
    }
    for (int64_t d = 0; d < dim; ++d) row[d] /= std::sqrt(square);
    return true;
}

// Asks for a token's metric ahead of its use: tokens of a packed qkv lie pages apart, where the
// hardware does not look by itself. Into L2, which keeps more lines on their way than L1.
template <class In>
TOME_INLINE void prefetch_token(const In* x, int64_t heads, int64_t stride_head, int64_t dim) {
    constexpr int64_t kLine = 64 / sizeof(In);
    for (int64_t h = 0; h < heads; ++h) {
        for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(x + h * stride_head + d, 0, 2);
    }
}

// kBlock vectors of one token's mean over heads, from channel d on, side by side: every head is
// read in a run as long as that. Adds up their squares.
//   x    (heads, dim)  the token's metric in every head
//   row  (dim) out
template <int kBlock, class In, class T, class V>
TOME_INLINE void mean_over_heads(const In* x, int64_t heads, int64_t stride_head, int64_t d,
                                 V share, T* row, V (&squares)[4]) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    V sum[kBlock];
    for (int u = 0; u < kBlock; ++u) sum[u] = load(x + d + u * kLanes);
    for (int64_t h = 1; h < heads; ++h) {
        const In* head = x + h * stride_head + d;
        for (int u = 0; u < kBlock; ++u) sum[u] += load(head + u * kLanes);
    }
    for (int u = 0; u < kBlock; ++u) {
        const V mean = sum[u] * share;
        squares[u % 4] += mean * mean;
        store(row + d + u * kLanes, mean);
    }
}

// One token's metric at length 1 (a zero vector stays zero). Returns false, and zeros, where it
// holds NaN or infinity.
//   x   (heads, dim)  the token's metric in every head
//   row (dim) out     mean over heads, normalised
template <class In, class T>
bool load_unit_row(const In* x, int64_t heads, int64_t stride_head, int64_t dim, T* row) {
    using V = typename Vector<T>::Type;
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const V share = broadcast<V>(T(1) / T(heads));
    V squares[4] = {};
    int64_t d = 0;
    for (; d + 8 * kLanes <= dim; d += 8 * kLanes) {
        mean_over_heads<8>(x, heads, stride_head, d, share, row, squares);
    }
    // The usual 64 channels are eight vectors of AVX2 but four of AVX-512.
    if (d + 4 * kLanes <= dim) {
        mean_over_heads<4>(x, heads, stride_head, d, share, row, squares);
        d += 4 * kLanes;
    }
    for (; d + kLanes <= dim; d += kLanes) {
        mean_over_heads<1>(x, heads, stride_head, d, share, row, squares);
    }
    if (d < dim) {
        const int64_t part = dim - d;
        V sum = load_part(x + d, part);
        for (int64_t h = 1; h < heads; ++h) sum += load_part(x + h * stride_head + d, part);
        sum *= share;
        squares[0] += sum * sum;
        store_part(row + d, sum, part);
    }
    const T square = total((squares[0] + squares[1]) + (squares[2] + squares[3]));
    // Between these, neither the squares nor their rounding are in danger.
    constexpr T kLow = sizeof(T) == 8 ? T(1e-280) : T(1e-28);
    constexpr T kHigh = sizeof(T) == 8 ? T(1e300) : T(1e36);
    if (!(square > kLow && square < kHigh)) return normalise_extreme(row, dim);
    const V by = broadcast<V>(T(1) / std::sqrt(square));
    for (d = 0; d + kLanes <= dim; d += kLanes) store(row + d, load(row + d) * by);
    for (; d < dim; ++d) row[d] *= by[0];
    return true;
}

// Columns [begin, end) of one image's set B.
template <class T>
struct PackedColumns {
    T* values;  // (panels, dim, kPanel)
    T* bias;    // (panels, kPanel): 0, or -inf where no token is or its metric is not finite
    int64_t begin, end;

    int64_t panels() const { return (end - begin + kPanel<T> - 1) / kPanel<T>; }
};

template <class In, class T>
void pack_panel(const MatchParams& p, int64_t image, const TokenSet& set,
                const PackedColumns<T>& packed, int64_t panel, T* rows) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const In* metric = static_cast<const In*>(p.metric) + image * p.stride_batch;
    T* values = packed.values + panel * p.dim * kPanel<T>;
    for (int64_t lane = 0; lane < kPanel<T>; lane += kLanes) {
        const int64_t column = packed.begin + panel * kPanel<T> + lane;
        if (column >= packed.end && lane > 0) break;  // nobody reads a panel's empty second half
        for (int64_t i = 0; i < kLanes; ++i) {
            bool usable = false;
            if (column + i < packed.end) {
                const int64_t ahead = set[std::min(column + i + kTokensAhead, set.count - 1)];
                prefetch_token(metric + ahead * p.stride_token, p.heads, p.stride_head, p.dim);
                usable = load_unit_row<In, T>(metric + set[column + i] * p.stride_token, p.heads,
                                              p.stride_head, p.dim, rows + i * p.dim);
            } else {
                std::fill(rows + i * p.dim, rows + (i + 1) * p.dim, T(0));
            }
            packed.bias[panel * kPanel<T> + lane + i] =
                usable ? T(0) : -std::numeric_limits<T>::infinity();
        }
        transpose_into_panel(rows, p.dim, p.dim, values + lane);
    }
}

// The best column so far of every lane, for the rows of one tile.
template <class T>
struct TileBest {
    typename Vector<T>::Type score[kTileRows];
    typename Vector<T>::Int column[kTileRows];
};

template <class T, int kRows, int kVectors>
TOME_INLINE void score_panel(const T* a, int64_t dim, const T* panel, const T* bias,
                             int64_t first_column, TileBest<T>& best) {
    using V = typename Vector<T>::Type;
    using Int = typename Vector<T>::Int;
    constexpr int kLanes = Vector<T>::kLanes;
    V sum[kRows][kVectors];
    clear(sum);
    multiply_panel(a, dim, 1, panel, dim, sum);
    Int column = lane_numbers<Int>() + broadcast<Int>(first_column);
    for (int v = 0; v < kVectors; ++v) {
        const V add = load(bias + v * kLanes);
        for (int i = 0; i < kRows; ++i) {
            const V score = sum[i][v] + add;
            // Strictly greater: among equals the earlier column stays.
            const Int better = score > best.score[i];
            best.score[i] = select<V>(better, score, best.score[i]);
            best.column[i] = (column & better) | (best.column[i] & ~better);
        }
        column += kLanes;
    }
}

// A tile of `rows` <= kRows A tokens against all packed columns. The instantiation for exactly
// `rows` runs, so that a short last tile costs what it holds.
template <class T, int kRows>
void score_tile(const T* a, int64_t rows, int64_t dim, const PackedColumns<T>& packed,
                TileBest<T>& best) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return score_tile<T, kRows - 1>(a, rows, dim, packed, best);
    }
    constexpr int64_t kLanes = Vector<T>::kLanes;
    for (int64_t panel = 0; panel < packed.panels(); ++panel) {
        const int64_t column = packed.begin + panel * kPanel<T>;
        const T* values = packed.values + panel * dim * kPanel<T>;
        const T* bias = packed.bias + panel * kPanel<T>;
        if (packed.end - column > kLanes) {
            score_panel<T, kRows, kPanelVectors>(a, dim, values, bias, column, best);
        } else {
            score_panel<T, kRows, 1>(a, dim, values, bias, column, best);
        }
    }
}

// Rows [begin, begin + rows) of set A against the packed columns, joined with what earlier chunks
// of columns left in nearest and similarity.
template <class In, class T>
void match_tile(const MatchParams& p, int64_t image, const TokenSet& set,
                const PackedColumns<T>& packed, int64_t begin, int64_t rows, T* tile,
                int32_t* nearest, T* similarity) {
    constexpr int kLanes = Vector<T>::kLanes;
    constexpr T kNever = -std::numeric_limits<T>::infinity();
    const In* metric = static_cast<const In*>(p.metric) + image * p.stride_batch;
    bool usable[kTileRows];
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t ahead = set[std::min(begin + i + kTokensAhead, set.count - 1)];
        prefetch_token(metric + ahead * p.stride_token, p.heads, p.stride_head, p.dim);
        usable[i] = load_unit_row<In, T>(metric + set[begin + i] * p.stride_token, p.heads,
                                         p.stride_head, p.dim, tile + i * p.dim);
    }
    TileBest<T> best;
    for (int i = 0; i < kTileRows; ++i) {
        best.score[i] = broadcast<typename Vector<T>::Type>(kNever);
        best.column[i] = typename Vector<T>::Int{};
    }
    score_tile<T, kTileRows>(tile, rows, p.dim, packed, best);
    for (int64_t i = 0; i < rows; ++i) {
        if (packed.begin == 0) {
            nearest[begin + i] = 0;
            similarity[begin + i] = kNever;
        }
        if (!usable[i]) continue;
        T score[kLanes];
        std::remove_reference_t<decltype(best.column[i][0])> column[kLanes];
        __builtin_memcpy(score, &best.score[i], sizeof(score));
        __builtin_memcpy(column, &best.column[i], sizeof(column));
        for (int half = kLanes / 2; half > 0; half /= 2) {  // without branches to mispredict
            for (int lane = 0; lane < half; ++lane) {
                const int other = lane + half;
                const bool take = (score[other] > score[lane]) |
                                  ((score[other] == score[lane]) & (column[other] < column[lane]));
                score[lane] = take ? score[other] : score[lane];
                column[lane] = take ? column[other] : column[lane];
            }
        }
        if (score[0] > similarity[begin + i]) {
            similarity[begin + i] = score[0];
            nearest[begin + i] = static_cast<int32_t>(column[0]);
        }
    }
}

template <class In>
void nearest_of(const MatchParams& p, const TokenSet& a, const TokenSet& b, int64_t image,
                const Threads& threads, int32_t* nearest, void* similarity) {
    using T = typename Accumulate<In>::Type;
    const int64_t chunk = std::min<int64_t>(tuning::columns_per_chunk(p.dim, sizeof(T), kPanel<T>),
                                            (b.count + kPanel<T> - 1) / kPanel<T> * kPanel<T>);
    const Scratch<T> values(chunk * p.dim);
    const Scratch<T> bias(chunk);
    const int64_t tiles = (a.count + kTileRows - 1) / kTileRows;
    for (int64_t begin = 0; begin < b.count; begin += chunk) {
        const PackedColumns<T> packed{values.get(), bias.get(), begin,
                                      std::min(begin + chunk, b.count)};
        threads.parallel_for(packed.panels(), 1, [&](int64_t first, int64_t last) {
            const Scratch<T> rows(Vector<T>::kLanes * p.dim);
            for (int64_t panel = first; panel < last; ++panel) {
                pack_panel<In, T>(p, image, b, packed, panel, rows.get());
            }
        });
        threads.parallel_for(tiles, 1, [&](int64_t first, int64_t last) {
            const Scratch<T> tile(kTileRows * p.dim);
            for (int64_t t = first; t < last; ++t) {
                match_tile<In, T>(p, image, a, packed, t * kTileRows,
                                  std::min<int64_t>(kTileRows, a.count - t * kTileRows), tile.get(),
                                  nearest, static_cast<T*>(similarity));
            }
        });
    }
}

void nearest(const MatchParams& params, const TokenSet& a, const TokenSet& b, int64_t image,
             const Threads& threads, int32_t* nearest, void* similarity) {
    switch (params.dtype) {
        case DType::kFloat32:
            return nearest_of<float>(params, a, b, image, threads, nearest, similarity);
        case DType::kFloat16:
            return nearest_of<Half>(params, a, b, image, threads, nearest, similarity);
        case DType::kBFloat16:
            return nearest_of<BFloat>(params, a, b, image, threads, nearest, similarity);
        case DType::kFloat64:
            return nearest_of<double>(params, a, b, image, threads, nearest, similarity);
    }
}

}  // namespace tome::TOME_ISA_NAMESPACE

#endif  // TOME_MATCH_INL

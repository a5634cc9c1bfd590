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

// How many tokens ahead the metric of set B is asked for while it is packed: enough to cover the
// latency of memory.
constexpr int64_t kTokensAhead = 2;

// Asks for the metric of tokens before it is read, a few cache lines at a time. Tokens of a packed
// qkv lie pages apart, where the hardware does not look by itself. Into L2, which keeps more lines
// on their way than L1.
class TokensAhead {
  public:
    // Tokens [first, last) of a set, in order.
    TokensAhead(const MatchParams& p, const TokenSet& set, int64_t image, int64_t first,
                int64_t last)
        : set_(set), token_(first - 1), last_(last) {
        const int64_t size = element_size(p.dtype);
        // One run for each head, or for all where they lie side by side.
        const bool one = p.stride_head == p.dim;
        runs_ = one ? 1 : p.heads;
        run_lines_ = ((one ? p.heads : 1) * p.dim * size + kLineBytes - 1) / kLineBytes;
        metric_ = static_cast<const char*>(p.metric) + image * p.stride_batch * size;
        stride_token_ = p.stride_token * size;
        stride_run_ = p.stride_head * size;
        run_ = runs_;
        next_run();
    }

    // The lines of that many tokens.
    int64_t lines(int64_t tokens) const { return tokens * runs_ * run_lines_; }

    // For the next lines, as long as there are tokens.
    TOME_INLINE void ask(int64_t lines) {
        while (lines > 0 && left_ > 0) {
            const int64_t now = std::min(lines, left_);
            const char* at = at_;
            for (int64_t i = 0; i < now; ++i, at += kLineBytes) __builtin_prefetch(at, 0, 2);
            at_ = at;
            lines -= now;
            left_ -= now;
            if (left_ == 0) next_run();
        }
    }

  private:
    static constexpr int64_t kLineBytes = 64;

    void next_run() {
        if (run_ == runs_) {
            if (++token_ >= last_) return;
            run_ = 0;
        }
        at_ = metric_ + set_[token_] * stride_token_ + run_ * stride_run_;
        left_ = run_lines_;
        ++run_;
    }

    const char* at_ = nullptr;
    int64_t left_ = 0;  // lines of this run
    TokenSet set_;
    int64_t token_, last_, run_, runs_, run_lines_;
    const char* metric_;
    int64_t stride_token_, stride_run_;
};

// What is asked for while the tiles of an image are multiplied, so that the memory works while the
// multipliers do: the next tile, and as much of the next image's set B as kAheadBytes.
struct Ahead {
    TokensAhead tile, image;
    int64_t depth = 8;                        // channels that are multiplied between two steps
    int64_t tile_lines = 0, image_lines = 0;  // of a step

    TOME_INLINE void step() {
        tile.ask(tile_lines);
        image.ask(image_lines);
    }
};

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

// kBlock vectors of one token's mean over heads, from channel d on, side by side: every head is
// read in a run as long as that. Adds up their squares. With kAhead, asks for the same channels of
// the token `ahead`, as TokensAhead does.
//   x    (heads, dim)  the token's metric in every head
//   row  (dim) out
template <bool kAhead, int kBlock, class In, class T, class V>
TOME_INLINE void mean_over_heads(const In* x, const In* ahead, int64_t heads, int64_t stride_head,
                                 int64_t d, V share, T* row, V (&squares)[4]) {
    constexpr int kLanes = Vector<T>::kLanes;
    constexpr int kLine = 64 / sizeof(In);
    V sum[kBlock] = {};
    for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = h * stride_head + d;
        for (int u = 0; u < kBlock; ++u) {
            if (kAhead && (kBlock == 1 || u * kLanes % kLine == 0)) {
                __builtin_prefetch(ahead + at + u * kLanes, 0, 2);
            }
            sum[u] += load(x + at + u * kLanes);
        }
    }
    for (int u = 0; u < kBlock; ++u) {
        const V mean = sum[u] * share;
        squares[u % 4] += mean * mean;
        store(row + d + u * kLanes, mean);
    }
}

// One token's mean over heads. Returns its squares, one sum in each lane.
//   x   (heads, dim)  the token's metric in every head
//   row (dim) out
template <bool kAhead, class In, class T, class V>
TOME_INLINE V load_mean(const In* x, const In* ahead, int64_t heads, int64_t stride_head,
                        int64_t dim, V share, T* row) {
    constexpr int64_t kLanes = Vector<T>::kLanes;
    V squares[4] = {};
    int64_t d = 0;
    for (; d + 8 * kLanes <= dim; d += 8 * kLanes) {
        mean_over_heads<kAhead, 8>(x, ahead, heads, stride_head, d, share, row, squares);
    }
    // The usual 64 channels are eight vectors of AVX2 but four of AVX-512.
    if (d + 4 * kLanes <= dim) {
        mean_over_heads<kAhead, 4>(x, ahead, heads, stride_head, d, share, row, squares);
        d += 4 * kLanes;
    }
    for (; d + kLanes <= dim; d += kLanes) {
        mean_over_heads<kAhead, 1>(x, ahead, heads, stride_head, d, share, row, squares);
    }
    if (d < dim) {
        const int64_t part = dim - d;
        V sum{};
        for (int64_t h = 0; h < heads; ++h) {
            if (kAhead) __builtin_prefetch(ahead + h * stride_head + d, 0, 2);
            sum += load_part(x + h * stride_head + d, part);
        }
        sum *= share;
        squares[0] += sum * sum;
        store_part(row + d, sum, part);
    }
    return (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

// The metric of tokens [first, first + count) of a set at length 1 (a zero vector stays zero);
// kMost of them at most. First all means and squares, then all lengths, then all divisions: a
// square root and a division are a long chain, and those of several tokens overlap.
//   rows    (count, dim) out  means over heads, normalised; zeros where one is not finite
//   usable  (count) out       whether it is finite
template <int kMost, bool kAhead, class In, class T>
void load_unit_rows(const MatchParams& p, int64_t image, const TokenSet& set, int64_t first,
                    int64_t count, T* rows, bool* usable) {
    using V = typename Vector<T>::Type;
    constexpr int64_t kLanes = Vector<T>::kLanes;
    const In* metric = static_cast<const In*>(p.metric) + image * p.stride_batch;
    const V share = broadcast<V>(T(1) / T(p.heads));
    V squares[kMost];
    for (int64_t i = 0; i < count; ++i) {
        const int64_t ahead =
            set[kAhead ? std::min(first + i + kTokensAhead, set.count - 1) : first + i];
        squares[i] = load_mean<kAhead, In, T>(metric + set[first + i] * p.stride_token,
                                              metric + ahead * p.stride_token, p.heads,
                                              p.stride_head, p.dim, share, rows + i * p.dim);
    }
    // Between these, neither the squares nor their rounding are in danger.
    constexpr T kLow = sizeof(T) == 8 ? T(1e-280) : T(1e-28);
    constexpr T kHigh = sizeof(T) == 8 ? T(1e300) : T(1e36);
    T factor[kMost];
    for (int64_t i = 0; i < count; ++i) {
        const T square = total(squares[i]);
        usable[i] = square > kLow && square < kHigh;
        factor[i] = T(1) / std::sqrt(square);
    }
    for (int64_t i = 0; i < count; ++i) {
        T* row = rows + i * p.dim;
        if (!usable[i]) {
            usable[i] = normalise_extreme(row, p.dim);
            continue;
        }
        const V by = broadcast<V>(factor[i]);
        int64_t d = 0;
        for (; d + kLanes <= p.dim; d += kLanes) store(row + d, load(row + d) * by);
        for (; d < p.dim; ++d) row[d] *= factor[i];
    }
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
    T* values = packed.values + panel * p.dim * kPanel<T>;
    for (int64_t lane = 0; lane < kPanel<T>; lane += kLanes) {
        const int64_t column = packed.begin + panel * kPanel<T> + lane;
        if (column >= packed.end && lane > 0) break;  // nobody reads a panel's empty second half
        const int64_t count = std::min(kLanes, packed.end - column);
        bool usable[kLanes] = {};
        load_unit_rows<kLanes, true, In>(p, image, set, column, count, rows, usable);
        std::fill(rows + count * p.dim, rows + kLanes * p.dim, T(0));
        for (int64_t i = 0; i < kLanes; ++i) {
            packed.bias[panel * kPanel<T> + lane + i] =
                usable[i] ? T(0) : -std::numeric_limits<T>::infinity();
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
                             int64_t first_column, Ahead& ahead, TileBest<T>& best) {
    using V = typename Vector<T>::Type;
    using Int = typename Vector<T>::Int;
    constexpr int kLanes = Vector<T>::kLanes;
    V sum[kRows][kVectors];
    clear(sum);
    for (int64_t d = 0; d < dim; d += ahead.depth) {
        ahead.step();
        multiply_panel(a + d, dim, 1, panel + d * kPanel<T>, std::min(ahead.depth, dim - d), sum);
    }
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
void score_tile(const T* a, int64_t rows, int64_t dim, const PackedColumns<T>& packed, Ahead& ahead,
                TileBest<T>& best) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return score_tile<T, kRows - 1>(a, rows, dim, packed, ahead, best);
    }
    constexpr int64_t kLanes = Vector<T>::kLanes;
    for (int64_t panel = 0; panel < packed.panels(); ++panel) {
        const int64_t column = packed.begin + panel * kPanel<T>;
        const T* values = packed.values + panel * dim * kPanel<T>;
        const T* bias = packed.bias + panel * kPanel<T>;
        if (packed.end - column > kLanes) {
            score_panel<T, kRows, kPanelVectors>(a, dim, values, bias, column, ahead, best);
        } else {
            score_panel<T, kRows, 1>(a, dim, values, bias, column, ahead, best);
        }
    }
}

// Rows [begin, begin + rows) of set A against the packed columns, joined with what earlier chunks
// of columns left in nearest and similarity.
template <class In, class T>
void match_tile(const MatchParams& p, int64_t image, const TokenSet& set,
                const PackedColumns<T>& packed, int64_t begin, int64_t rows, Ahead& ahead, T* tile,
                int32_t* nearest, T* similarity) {
    using V = typename Vector<T>::Type;
    using Int = typename Vector<T>::Int;
    constexpr T kNever = -std::numeric_limits<T>::infinity();
    bool usable[kTileRows];
    load_unit_rows<kTileRows, false, In>(p, image, set, begin, rows, tile, usable);
    TileBest<T> best;
    for (int i = 0; i < kTileRows; ++i) {
        best.score[i] = broadcast<V>(kNever);
        best.column[i] = Int{};
    }
    score_tile<T, kTileRows>(tile, rows, p.dim, packed, ahead, best);
    for (int64_t i = 0; i < rows; ++i) {
        if (packed.begin == 0) {
            nearest[begin + i] = 0;
            similarity[begin + i] = kNever;
        }
        if (!usable[i]) continue;
        // The first of the columns that have the largest score.
        const T score = largest(best.score[i]);
        const Int at = best.score[i] == broadcast<V>(score);
        const Int none =
            broadcast<Int>(std::numeric_limits<std::remove_reference_t<decltype(at[0])>>::max());
        const auto column = smallest(select<Int>(at, best.column[i], none));
        if (score > similarity[begin + i]) {
            similarity[begin + i] = score;
            nearest[begin + i] = static_cast<int32_t>(column);
        }
    }
}

// What to ask for while tiles [first, last) of an image are multiplied with packed columns: each
// next tile, and with the last columns the start of the next image's set B (where tokens are
// hidden, by this image's list), which would be pushed out of L2 again if it were asked for before.
template <class T>
Ahead what_follows(const MatchParams& p, const TokenSet& a, const TokenSet& b, int64_t image,
                   int64_t first, int64_t last, const PackedColumns<T>& packed) {
    const int64_t token_bytes = std::max<int64_t>(1, p.heads * p.dim * element_size(p.dtype));
    const bool goes_on = packed.end == b.count && image + 1 < p.batch;
    const int64_t tokens = goes_on ? std::min(tuning::kAheadBytes / token_bytes, b.count) : 0;
    const int64_t panels = packed.panels();
    Ahead ahead{{p, a, image, first * kTileRows, std::min(last * kTileRows, a.count)},
                {p, b, goes_on ? image + 1 : image, 0, tokens}};
    // Several lines a step, as each costs a few instructions.
    const int64_t lines = ahead.tile.lines(kTileRows);
    while (ahead.depth < p.dim && lines * ahead.depth < 4 * panels * p.dim) ahead.depth *= 2;
    const int64_t steps = std::max<int64_t>(1, panels * ((p.dim + ahead.depth - 1) / ahead.depth));
    const auto share = [](int64_t x, int64_t parts) { return (x + parts - 1) / parts; };
    ahead.tile_lines = share(lines, steps);
    ahead.image_lines = share(ahead.image.lines(tokens), steps * (last - first));
    return ahead;
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
            Ahead ahead = what_follows(p, a, b, image, first, last, packed);
            ahead.tile.ask(ahead.tile.lines(kTileRows));
            for (int64_t t = first; t < last; ++t) {
                match_tile<In, T>(p, image, a, packed, t * kTileRows,
                                  std::min<int64_t>(kTileRows, a.count - t * kTileRows), ahead,
                                  tile.get(), nearest, static_cast<T*>(similarity));
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

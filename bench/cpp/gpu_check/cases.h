// What is run: every operator with many shapes and dtypes, and how a case is called.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "arrays.h"

namespace gpu_check {

enum class Op {
    kMatch,
    kSelect,
    kPlan,
    kMerge,
    kMergeBackward,
    kMergeAddNorm,
    kUnmerge,
    kChain,  // match, merge, merge_add_norm and unmerge one behind the other, as in a block; with
             // `fuse` select in place of match
    kAttention,
    kAttentionBackward,
    kClsAttention,
};
inline constexpr const char* kOpNames[] = {
    "match",          "select",  "plan",  "merge",     "merge_backward",
    "merge_add_norm", "unmerge", "chain", "attention", "attention_backward",
    "cls_attention"};

// kNone: of merge_add_norm also no scale, weight or bias. kZeros: one token in four hidden; all of
// one image. kSpoiled, of attention: others, and hidden keys and values hold NaN and infinities; of
// match: some tokens hold them, and some are too large or small for the squares of their elements.
enum class Sizes { kNone, kSome, kZeros, kSpoiled };

inline constexpr unsigned kAll = 1, kSanitizer = 2, kRepeats = 4, kEmulator = 8;  // sets of cases

struct Case {
    Op op = Op::kMatch;
    DType dtype = DType::kBFloat16;
    int64_t batch = 1, heads = 1, queries = 0, tokens = 0, dim = 0;  // dim: also channels
    int64_t r = 0, prefix = 0;  // r: also how many rows fewer than tokens, and what select drops
    Layout layout = Layout::kPacked;
    Sizes sizes = Sizes::kSome;
    tome::Reduce reduce = tome::Reduce::kMean;
    bool fuse = false;
    bool keep_norms = false;
    bool targets = false;  // match: one token in three is what others merge into
    bool near = false;     // match: all pairs from a similarity on merge, and r others
    bool costs = false;    // match: pairs rank by sizes and importance, too
    unsigned sets = kAll;
};

inline const char* short_name(DType dtype) {
    constexpr const char* kNames[] = {"f32", "f16", "bf16", "f64"};
    return kNames[static_cast<int>(dtype)];
}

inline std::string name_of(const Case& c) {
    char text[160];
    const bool attention = c.op >= Op::kAttention;
    std::snprintf(text, sizeof text, "%s:%s:B%lldH%lldN%lldD%lld", kOpNames[int(c.op)],
                  short_name(c.dtype), static_cast<long long>(c.batch),
                  static_cast<long long>(c.heads), static_cast<long long>(c.tokens),
                  static_cast<long long>(c.dim));
    std::string name = text;
    const auto number = [&](const char* letter, int64_t value) {
        name += letter + std::to_string(value);
    };
    if (attention && c.op != Op::kClsAttention && c.queries != c.tokens) number("M", c.queries);
    if (!attention) number("r", c.r);
    if (c.prefix > 0) number("p", c.prefix);
    constexpr const char* kLayouts[] = {"", ":heads", ":odd", ":mixed"};
    name += kLayouts[int(c.layout)];
    constexpr const char* kSizes[] = {":none", "", ":zeros", ":spoiled"};
    name += kSizes[int(c.sizes)];
    constexpr const char* kReduces[] = {"", ":sum", ":amax"};
    name += kReduces[int(c.reduce)];
    if (c.fuse) name += ":fuse";
    if (c.keep_norms) name += ":norms";
    if (c.targets) name += ":targets";
    if (c.near) name += ":near";
    if (c.costs) name += ":costs";
    return name;
}

inline constexpr DType kF32 = DType::kFloat32, kF16 = DType::kFloat16, kBF16 = DType::kBFloat16,
                       kF64 = DType::kFloat64;

inline std::vector<Case> match_cases() {
    std::vector<Case> all;
    const auto add = [&](DType dtype, int64_t batch, int64_t heads, int64_t tokens, int64_t dim,
                         int64_t r, int64_t prefix, Layout layout, unsigned sets = kAll) {
        Case c;
        c.op = Op::kMatch, c.dtype = dtype, c.batch = batch, c.heads = heads, c.tokens = tokens;
        c.dim = dim, c.r = r, c.prefix = prefix, c.layout = layout, c.sets = sets;
        all.push_back(c);
    };
    for (DType dtype : {kBF16, kF32, kF16, kF64}) {
        const unsigned watched = dtype == kBF16 || dtype == kF64 ? kSanitizer : 0u;
        for (int64_t n = 2; n <= 17; ++n) {  // as many as can be, and a few
            const bool some = n == 2 || n == 7 || n == 16;
            add(dtype, 2, 3, n, 64, n, n % 3, Layout::kPacked,
                kAll | (some && dtype != kF16 ? kEmulator | watched : 0u));
            add(dtype, 3, 1, n, 40, n / 3, 1, Layout::kOdd);
        }
        add(dtype, 3, 5, 50, 80, 24, 2, Layout::kPacked, kAll | kEmulator | watched);
        add(dtype, 2, 2, 31, 37, 7, 0, Layout::kOdd, kAll | kEmulator);
        add(dtype, 4, 12, 197, 64, 13, 1, Layout::kPacked,
            kAll | watched | (dtype == kBF16 ? kRepeats : 0u));
        add(dtype, 1, 12, 197, 64, 13, 1, Layout::kPacked, kAll | (dtype == kBF16 ? kRepeats : 0u));
        add(dtype, 1, 12, 197, 64, 98, 1, Layout::kHeads);
        add(dtype, 2, 16, 577, 64, 23, 1, Layout::kPacked, kAll | (dtype == kBF16 ? kRepeats : 0u));
        add(dtype, 1, 4, 1025, 128, 300, 5, Layout::kPacked);
        add(dtype, 1, 1, 4096, 320, 2048, 0, Layout::kHeads,
            kAll | (dtype == kBF16 ? kRepeats : 0u));
    }
    add(kBF16, 150, 12, 197, 64, 13, 1, Layout::kPacked);  // more images than multiprocessors

    // One head, as guided merging has it: a block an image, or several, and rows of many parts.
    for (DType dtype : {kBF16, kF32, kF16, kF64}) {
        const unsigned watched = dtype == kBF16 || dtype == kF32 ? kSanitizer : 0u;
        add(dtype, 2, 1, 50, 136, 20, 1, Layout::kHeads, kAll | kEmulator | watched);
        add(dtype, 1, 1, 197, 768, 13, 1, Layout::kHeads, kAll | (dtype == kBF16 ? kRepeats : 0u));
        add(dtype, 2, 1, 577, 1024, 23, 1, Layout::kHeads);
        if (dtype == kF64) continue;
        add(dtype, 192, 1, 197, 768, 13, 1, Layout::kHeads,
            kAll | (dtype == kBF16 ? kRepeats : 0u));
    }
    // Pairs that rank by what merging them costs, and tokens that are no numbers, or huge.
    for (DType dtype : {kBF16, kF32, kF16, kF64}) {
        for (Sizes sizes : {Sizes::kSome, Sizes::kSpoiled}) {
            const size_t first = all.size();
            const unsigned watched = dtype == kBF16 ? kSanitizer : 0u;
            add(dtype, 3, 5, 50, 80, 24, 2, Layout::kPacked, kAll | kEmulator | watched);
            add(dtype, 3, 1, 50, 136, 20, 1, Layout::kHeads, kAll | kEmulator | watched);
            add(dtype, 4, 12, 197, 64, 13, 1, Layout::kPacked);
            add(dtype, 1, 12, 197, 64, 13, 1, Layout::kPacked);
            add(dtype, 1, 1, 197, 768, 13, 1, Layout::kHeads);
            add(dtype, 192, 1, 197, 192, 13, 1, Layout::kHeads);
            add(dtype, 2, 16, 577, 64, 150, 1, Layout::kPacked);
            add(dtype, 2, 1, 577, 1024, 150, 1, Layout::kHeads);
            add(dtype, 1, 1, 1100, 40, 300, 0, Layout::kOdd);
            for (size_t i = first; i < all.size(); ++i) {
                all[i].sizes = sizes, all[i].costs = sizes == Sizes::kSome;
            }
        }
    }

    // Hidden tokens, targets other than the odd positions, another number of merges in each image.
    struct Form {
        Sizes sizes;
        bool targets, near;
    };
    for (const Form& form : {Form{Sizes::kZeros, false, false}, Form{Sizes::kSome, true, false},
                             Form{Sizes::kZeros, true, false}, Form{Sizes::kSome, false, true},
                             Form{Sizes::kZeros, true, true}}) {
        const size_t first = all.size();
        for (DType dtype : {kBF16, kF32, kF16, kF64}) {
            const unsigned watched = dtype == kBF16 || dtype == kF64 ? kSanitizer : 0u;
            add(dtype, 3, 2, 17, 40, 17, 2, Layout::kOdd, kAll | kEmulator);
            add(dtype, 3, 5, 50, 80, 24, 2, Layout::kPacked, kAll | kEmulator | watched);
            add(dtype, 4, 12, 197, 64, 13, 1, Layout::kPacked,
                kAll | watched | (dtype == kBF16 ? kRepeats : 0u));
            add(dtype, 2, 16, 577, 64, 150, 1, Layout::kPacked);
            add(dtype, 3, 1, 50, 136, 20, 1, Layout::kHeads, kAll | kEmulator);
            if (!form.near) add(dtype, 2, 1, 4096, 64, 1500, 0, Layout::kHeads);
        }
        for (size_t i = first; i < all.size(); ++i) {
            all[i].sizes = form.sizes, all[i].targets = form.targets, all[i].near = form.near;
        }
    }
    return all;
}

inline std::vector<Case> plan_cases() {
    std::vector<Case> all;
    struct Shape {
        int64_t batch, tokens, r, prefix;
    };
    for (const Shape& s : {Shape{2, 1, 0, 0}, Shape{3, 17, 8, 1}, Shape{4, 197, 60, 1},
                           Shape{2, 577, 500, 1}, Shape{1, 4096, 1000, 5}}) {
        Case c;
        c.batch = s.batch, c.tokens = s.tokens, c.r = s.r, c.prefix = s.prefix;
        c.sets = kAll | (s.tokens == 197 ? kSanitizer : 0u) | (s.tokens < 500 ? kEmulator : 0u);
        for (DType dtype : {kF32, kF64}) {
            for (bool fuse : {false, true}) {
                c.op = Op::kSelect, c.dtype = dtype, c.fuse = fuse;
                all.push_back(c);
            }
        }
        c.op = Op::kPlan, c.dtype = kF32, c.fuse = false;
        all.push_back(c);
    }
    return all;
}

inline std::vector<Case> merge_cases() {
    std::vector<Case> all;
    struct Shape {
        int64_t batch, tokens, channels, r;
        Layout layout;
        unsigned sets;
    };
    const Shape shapes[] = {
        {4, 197, 768, 13, Layout::kHeads, kAll | kSanitizer},
        {2, 577, 1024, 23, Layout::kHeads, kAll},
        {1, 197, 768, 13, Layout::kHeads, kAll},
        {3, 50, 37, 24, Layout::kOdd, kAll | kSanitizer | kEmulator},
        {2, 31, 40, 7, Layout::kHeads, kAll | kEmulator},
        {2, 33, 72, 30, Layout::kOdd, kAll},
        {1, 130, 1280, 64, Layout::kHeads, kAll},
        {1, 4096, 320, 2048, Layout::kHeads, kAll},
        {1, 17, 2500, 5, Layout::kHeads, kAll},    // more channels than most blocks have lanes
        {192, 197, 64, 13, Layout::kHeads, kAll},  // a warp takes two rows of merge
    };
    for (DType dtype : {kBF16, kF32, kF16, kF64}) {
        for (const Shape& s : shapes) {
            Case c;
            c.dtype = dtype, c.batch = s.batch, c.tokens = s.tokens, c.dim = s.channels;
            c.r = s.r, c.layout = s.layout;
            for (Op op : {Op::kMerge, Op::kMergeBackward, Op::kMergeAddNorm, Op::kUnmerge}) {
                c.op = op, c.reduce = tome::Reduce::kMean;
                c.sets = dtype == kBF16 || dtype == kF32 ? s.sets : s.sets & ~kSanitizer;
                if (op == Op::kMerge && s.tokens == 197 && dtype == kBF16) c.sets |= kRepeats;
                all.push_back(c);
                if (op == Op::kUnmerge) continue;
                if (s.tokens == 50 || s.tokens == 197) {
                    c.sets = s.sets & ~kSanitizer;
                    for (Sizes sizes : {Sizes::kNone, Sizes::kZeros}) {
                        c.sizes = sizes;
                        all.push_back(c);
                    }
                    c.sets = kAll;
                    c.sizes = Sizes::kSome;
                    if (op == Op::kMergeAddNorm) {
                        c.keep_norms = true;
                        c.sets = s.sets;
                        all.push_back(c);
                        c.keep_norms = false;
                        continue;
                    }
                    c.reduce = tome::Reduce::kSum;
                    all.push_back(c);
                    if (op == Op::kMergeBackward) continue;
                    c.reduce = tome::Reduce::kAmax;
                    all.push_back(c);
                }
            }
        }
        for (int64_t batch : {1, 8}) {
            Case c;
            c.op = Op::kChain, c.dtype = dtype, c.batch = batch, c.heads = 12, c.tokens = 197;
            c.dim = 64, c.r = 13, c.prefix = 1;
            c.sets = kAll | (dtype == kBF16 ? kRepeats : 0u) | (batch == 1 ? kSanitizer : 0u);
            if (batch == 1 || dtype == kBF16) all.push_back(c);
        }
        // Behind every kernel that lets the next one begin.
        for (int form = 0; form < 6; ++form) {
            Case c;
            c.op = Op::kChain, c.dtype = dtype, c.batch = 2, c.heads = 2, c.tokens = 33, c.dim = 20;
            c.r = 9, c.prefix = 1, c.sets = kAll | kEmulator;
            if (form == 1) c.heads = 1, c.dim = 136;
            if (form == 2) c.sizes = Sizes::kZeros;
            if (form == 3) c.targets = true;
            if (form == 4) c.heads = 1, c.dim = 136, c.costs = true;
            if (form == 5) c.fuse = true;
            all.push_back(c);
            if (form == 0 || dtype != kBF16) continue;
            c.batch = 64, c.tokens = 197, c.heads = form == 1 || form == 4 ? 1 : 12;
            c.dim = c.heads == 1 ? 768 : 64, c.r = 13, c.sets = kAll | kRepeats;
            all.push_back(c);
        }
    }
    // What a ViT-B merges at 192 images, by pairs of rows.
    Case c;
    c.op = Op::kMerge, c.batch = 192, c.tokens = 197, c.dim = 768, c.r = 13;
    c.layout = Layout::kHeads, c.sets = kAll | kRepeats;
    all.push_back(c);
    return all;
}

inline std::vector<Case> attention_cases() {
    std::vector<Case> all;
    const auto add = [&](DType dtype, int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                         int64_t dim, Layout layout, Sizes sizes, unsigned sets = kAll) {
        Case c;
        c.dtype = dtype, c.batch = batch, c.heads = heads, c.queries = queries, c.tokens = keys;
        c.dim = dim, c.layout = layout, c.sizes = sizes, c.sets = sets;
        for (Op op : {Op::kAttention, Op::kAttentionBackward}) {
            c.op = op;
            all.push_back(c);
        }
    };
    for (DType dtype : {kBF16, kF16, kF32}) {
        const unsigned watched = dtype == kF16 ? 0u : kSanitizer;
        const unsigned repeated = dtype == kBF16 ? kRepeats : 0u;
        for (int64_t n : {1, 5, 16, 49, 50, 64, 65, 80, 128, 150, 197, 208, 256, 257, 577, 1025}) {
            const bool small = n == 5 || n == 50 || n == 65;
            add(dtype, 2, 3, n, n, 64, Layout::kPacked, Sizes::kSome,
                kAll | (small ? kEmulator : 0u) | (n == 50 || n == 197 || n == 257 ? watched : 0u) |
                    (n == 197 || n == 577 ? repeated : 0));
        }
        for (int64_t n : {50, 197, 577}) {
            add(dtype, 3, 2, n, n, 64, Layout::kPacked, Sizes::kZeros,
                kAll | (n == 50 ? kEmulator | watched : 0u));
            add(dtype, 2, 2, n, n, 64, Layout::kPacked, Sizes::kNone);
            add(dtype, 2, 2, n, n, 64, Layout::kHeads, Sizes::kSome);
            add(dtype, 1, 2, n, n, 64, Layout::kOdd, Sizes::kSome);
        }
        struct Pair {
            int64_t queries, keys;
        };
        for (const Pair& s : {Pair{1, 197}, Pair{5, 64}, Pair{197, 5}, Pair{50, 257}, Pair{577, 80},
                              Pair{128, 577}, Pair{33, 208}, Pair{300, 197}}) {
            add(dtype, 2, 2, s.queries, s.keys, 64, Layout::kPacked, Sizes::kSome,
                kAll | (s.queries == 5 ? kEmulator : 0u));
        }
        for (int64_t dim : {32, 72, 80, 128, 17, 48, 96}) {
            for (int64_t n : {1, 50, 197, 257}) {
                add(dtype, 2, 2, n, n, dim, Layout::kPacked, Sizes::kSome,
                    kAll | (n == 50 && (dim == 72 || dim == 128) ? watched : 0u) |
                        (n == 50 && dim == 72 && dtype == kBF16 ? kEmulator : 0u));
            }
        }
        add(dtype, 16, 12, 197, 197, 64, Layout::kPacked, Sizes::kSome);
        // So many heads that a block takes all queries of one.
        if (dtype == kBF16) add(dtype, 32, 12, 197, 197, 64, Layout::kPacked, Sizes::kSome);
        for (int64_t n : {50, 197, 577}) {
            add(dtype, 2, 2, n, n, 64, Layout::kMixed, Sizes::kSome,
                kAll | (n == 50 ? kEmulator : 0u));
        }
        add(dtype, 2, 2, 128, 577, 80, Layout::kHeads, Sizes::kZeros);
        // Every kernel; of 64 channels also those in which keys pass in stages.
        for (int64_t dim : {32, 64, 72, 80, 96, 128, 17}) {
            for (int64_t n : {50, 197, 577}) {
                add(dtype, 3, 2, n, n, dim, Layout::kPacked, Sizes::kSpoiled,
                    kAll | (n == 50 && (dim == 64 || dim == 80) ? kEmulator | watched : 0u));
            }
        }
        add(dtype, 3, 2, 33, 150, 64, Layout::kOdd, Sizes::kSpoiled);
        for (Layout layout : {Layout::kPacked, Layout::kOdd}) {
            Case c;
            c.op = Op::kClsAttention, c.dtype = dtype, c.batch = 3, c.heads = 3, c.queries = 1;
            c.tokens = 197, c.dim = 64, c.layout = layout, c.sizes = Sizes::kSpoiled;
            c.sets = kAll | (layout == Layout::kPacked ? kEmulator | watched : 0u);
            all.push_back(c);
        }
        for (int64_t n : {1, 5, 50, 197, 577, 1025, 4096}) {
            Case c;
            c.op = Op::kClsAttention, c.dtype = dtype, c.heads = n == 4096 ? 16 : n == 197 ? 12 : 3;
            c.batch = n == 197 ? 64 : 2;  // more blocks than fit a GPU at once
            c.queries = 1, c.tokens = n, c.dim = n == 50 ? 80 : 64;
            c.sizes = n == 577 ? Sizes::kZeros : n == 1025 ? Sizes::kNone : Sizes::kSome;
            c.sets = kAll | (n == 50 ? kEmulator | watched : 0u) | (n == 197 ? repeated : 0);
            all.push_back(c);
            if (n != 50 && n != 197) continue;
            c.batch = n == 50 ? 2 : 1, c.sets = kAll | (n == 50 ? kEmulator : repeated);
            for (int64_t dim : {24, 64, 136}) {  // less than a lane's share of loads, and more
                c.dim = dim;
                if (n == 50 || dim == 64) all.push_back(c);
            }
        }
    }
    return all;
}

// The most useful first: the time for all may run out.
inline std::vector<Case> every_case() {
    std::vector<Case> all;
    for (auto* make : {attention_cases, match_cases, merge_cases, plan_cases}) {
        const std::vector<Case> some = make();
        all.insert(all.end(), some.begin(), some.end());
    }
    std::stable_partition(all.begin(), all.end(),
                          [](const Case& c) { return c.dtype == DType::kBFloat16; });
    return all;
}

}  // namespace gpu_check

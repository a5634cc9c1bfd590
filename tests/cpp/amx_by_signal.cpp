// The instructions of AMX that amx.inl has, by hand, where the processor does not know them:
// decoded from the bytes at the fault, as the compiler encoded them, and done on tiles of this
// file. (Intel's manual, volume 2: "TDPBF16PS", "TILELOADD", ...)

#include "amx_kernels.h"

#if defined(TOME_HAS_X86_KERNELS) && defined(__linux__)

#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tome_test {
namespace {

constexpr int kRows = 16, kRowBytes = 64;

struct Tiles {
    bool configured = false;
    uint8_t rows[8] = {};
    uint16_t row_bytes[8] = {};
    uint8_t data[8][kRows][kRowBytes] = {};
};
thread_local Tiles tiles;

[[noreturn]] void give_up(const uint8_t* at, const char* why) {
    std::fprintf(stderr, "amx_by_signal: %s:", why);
    for (int i = 0; i < 8; ++i) std::fprintf(stderr, " %02x", at[i]);
    std::fprintf(stderr, "\n");
    std::abort();
}

// A general register by its number in an instruction.
uint64_t register_of(const ucontext_t& context, int number) {
    constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                               REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                               REG_R12, REG_R13, REG_R14, REG_R15};
    return static_cast<uint64_t>(context.uc_mcontext.gregs[kPlaces[number]]);
}

// What an instruction's bytes say.
struct Instruction {
    int prefix = 0;  // 0: none, 1: 66, 2: F3, 3: F2
    int third = 0;   // the register that the VEX prefix names
    int opcode = 0, mode = 0, reg = 0, rm = 0;
    uint64_t base = 0, index = 0;  // of an address; index times its scale
    int64_t displacement = 0;
    int length = 0;

    uint8_t* row(int64_t i) const {
        return reinterpret_cast<uint8_t*>(base + static_cast<uint64_t>(displacement) +
                                          static_cast<uint64_t>(i) * index);
    }
};

Instruction decode(const uint8_t* at, const ucontext_t& context) {
    Instruction x;
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84) != 0) {
        give_up(at, "not an instruction of AMX");
    }
    const int index_high = (at[1] & 0x40) ? 0 : 8, base_high = (at[1] & 0x20) ? 0 : 8;
    x.third = ~(at[2] >> 3) & 15;
    x.prefix = at[2] & 3;
    x.opcode = at[3];
    x.mode = at[4] >> 6;
    x.reg = at[4] >> 3 & 7;
    x.rm = at[4] & 7;
    x.length = 5;
    if (x.mode == 3) return x;
    int base = x.rm;
    if (x.rm == 4) {
        const uint8_t sib = at[x.length++];
        base = sib & 7;
        const int index = (sib >> 3 & 7) | index_high;
        if (index != 4) x.index = register_of(context, index) << (sib >> 6);
    }
    if (x.mode == 0 && base == 5) {
        int32_t far;
        std::memcpy(&far, at + x.length, 4);
        x.displacement = far;
        x.length += 4;
        if (x.rm == 5) x.base = reinterpret_cast<uint64_t>(at) + static_cast<uint64_t>(x.length);
        return x;
    }
    x.base = register_of(context, base | base_high);
    if (x.mode == 1) {
        x.displacement = static_cast<int8_t>(at[x.length++]);
    } else if (x.mode == 2) {
        int32_t far;
        std::memcpy(&far, at + x.length, 4);
        x.displacement = far;
        x.length += 4;
    }
    return x;
}

void configure(const uint8_t* config, const uint8_t* at) {
    if (config[0] != 1 || config[1] != 0) give_up(at, "palette 1 and row 0 are what is known");
    for (int i : {2, 15, 32, 47, 56, 63}) {
        if (config[i] != 0) give_up(at, "reserved bytes of a configuration that are not 0");
    }
    tiles = {};
    tiles.configured = true;
    for (int t = 0; t < 8; ++t) {
        std::memcpy(&tiles.row_bytes[t], config + 16 + 2 * t, 2);
        tiles.rows[t] = config[48 + t];
        if (tiles.rows[t] > kRows || tiles.row_bytes[t] > kRowBytes) give_up(at, "tile too large");
    }
}

float bfloat_at(const uint8_t* row, int i) {
    uint16_t bits;
    std::memcpy(&bits, row + 2 * i, 2);
    if ((bits & 0x7f80) == 0) bits &= 0x8000;
    const uint32_t wide = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

void multiply_add(int sum, int left, int right, const uint8_t* at) {
    if (tiles.rows[sum] != tiles.rows[left] || tiles.row_bytes[sum] != tiles.row_bytes[right] ||
        tiles.row_bytes[left] / 4 != tiles.rows[right]) {
        give_up(at, "tiles whose shapes do not fit");
    }
    for (int i = 0; i < tiles.rows[sum]; ++i) {
        for (int j = 0; j < tiles.row_bytes[sum] / 4; ++j) {
            float even = 0, odd = 0;
            for (int p = 0; p < tiles.rows[right]; ++p) {
                even +=
                    bfloat_at(tiles.data[left][i], 2 * p) * bfloat_at(tiles.data[right][p], 2 * j);
                odd += bfloat_at(tiles.data[left][i], 2 * p + 1) *
                       bfloat_at(tiles.data[right][p], 2 * j + 1);
            }
            float value;
            std::memcpy(&value, &tiles.data[sum][i][4 * j], 4);
            value += even + odd;
            std::memcpy(&tiles.data[sum][i][4 * j], &value, 4);
        }
    }
}

void on_unknown_instruction(int, siginfo_t*, void* raw) {
    ucontext_t& context = *static_cast<ucontext_t*>(raw);
    const auto* at = reinterpret_cast<const uint8_t*>(context.uc_mcontext.gregs[REG_RIP]);
    const Instruction x = decode(at, context);
    const bool shapes = x.opcode == 0x49 && x.prefix == 0;
    if (!shapes && !tiles.configured) give_up(at, "tiles that are not configured");
    if (shapes && x.mode == 3) {  // tilerelease
        tiles = {};
    } else if (shapes) {
        configure(x.row(0), at);
    } else if (x.opcode == 0x49 && x.prefix == 3 && x.mode == 3) {  // tilezero
        std::memset(tiles.data[x.reg], 0, sizeof(tiles.data[x.reg]));
    } else if (x.opcode == 0x4b && x.mode != 3 && (x.prefix == 3 || x.prefix == 2)) {
        for (int i = 0; i < tiles.rows[x.reg]; ++i) {
            uint8_t* row = tiles.data[x.reg][i];
            if (x.prefix == 3) {  // tileloadd
                std::memcpy(row, x.row(i), tiles.row_bytes[x.reg]);
            } else {  // tilestored
                std::memcpy(x.row(i), row, tiles.row_bytes[x.reg]);
            }
        }
    } else if (x.opcode == 0x5c && x.prefix == 2 && x.mode == 3) {  // tdpbf16ps
        multiply_add(x.reg, x.rm, x.third, at);
    } else {
        give_up(at, "an instruction that amx.inl does not have");
    }
    context.uc_mcontext.gregs[REG_RIP] += x.length;
}

}  // namespace

bool amx_runs_by_signal() {
    static const bool runs = [] {
        const tome::Isa before = tome::active_isa();
        const bool real = tome::set_isa(tome::Isa::kAmxBf16);
        const bool rest = tome::set_isa(tome::Isa::kAvx512Bf16);
        tome::set_isa(before);
        if (real || !rest) return false;
        struct sigaction action = {};
        action.sa_sigaction = on_unknown_instruction;
        action.sa_flags = SA_SIGINFO;
        return sigaction(SIGILL, &action, nullptr) == 0;
    }();
    return runs;
}

}  // namespace tome_test

#else

namespace tome_test {
bool amx_runs_by_signal() { return false; }
}  // namespace tome_test

#endif

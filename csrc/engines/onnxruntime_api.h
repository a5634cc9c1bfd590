// What onnxruntime.cpp calls of ONNX Runtime, as its binary interface has it: its Python package
// holds no headers, and a library of operators links to nothing of it.
//
// The places are those of onnxruntime_c_api.h (MIT), which only ever appends: an OrtApi is a table
// of functions, so that a function is known by its place in it, in every release since the one that
// added it. The newest one here is of 1.17.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtStatus;  // null is success
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

struct OrtApi {
    void (*functions[275])();
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);  // null if it is newer than the runtime
    const char* (*GetVersionString)();
};

// ONNXTensorElementDataType
enum OrtElement : int32_t {
    kOrtFloat32 = 1,
    kOrtInt32 = 6,
    kOrtFloat16 = 10,
    kOrtFloat64 = 11,
    kOrtBFloat16 = 16,
};

enum OrtPresence : int32_t { kOrtRequired = 0, kOrtOptional = 1 };  // of an input or output
enum OrtErrorCode : int32_t { kOrtFail = 1, kOrtInvalidArgument = 2 };

// Members of later releases follow, which are not read if `version` is that of this one.
struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    OrtElement (*GetInputType)(const OrtCustomOp*, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    OrtElement (*GetOutputType)(const OrtCustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void*, OrtKernelContext*);
    void (*KernelDestroy)(void*);
    OrtPresence (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
    OrtPresence (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
    int32_t (*GetInputMemoryType)(const OrtCustomOp*, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
    OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
};
}

namespace tome::engines::ort {

constexpr uint32_t kApiVersion = 17;

// A function of the table: `kCreateStatus.of(api)(code, message)`.
template <class Function>
struct Entry {
    size_t place;
    Function* of(const OrtApi* api) const {
        return reinterpret_cast<Function*>(api->functions[place]);
    }
};

inline constexpr Entry<OrtStatus*(OrtErrorCode, const char*)> kCreateStatus{0};
inline constexpr Entry<const char*(const OrtStatus*)> kGetErrorMessage{2};
inline constexpr Entry<OrtStatus*(const char*, OrtCustomOpDomain**)> kCreateCustomOpDomain{26};
inline constexpr Entry<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> kAddToDomain{27};
inline constexpr Entry<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> kAddDomain{28};
inline constexpr Entry<OrtStatus*(OrtValue*, void**)> kGetTensorData{51};
inline constexpr Entry<OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)> kGetRank{61};
inline constexpr Entry<OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)> kGetDims{62};
inline constexpr Entry<OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)> kGetShape{65};
inline constexpr Entry<OrtStatus*(const OrtKernelInfo*, const char*, float*)> kGetFloat{85};
inline constexpr Entry<OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)> kGetInteger{86};
inline constexpr Entry<OrtStatus*(const OrtKernelInfo*, const char*, char*, size_t*)> kGetString{
    87};
inline constexpr Entry<OrtStatus*(const OrtKernelContext*, size_t*)> kGetInputCount{88};
inline constexpr Entry<OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)> kGetInput{90};
inline constexpr Entry<OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>
    kGetOutput{91};
inline constexpr Entry<void(OrtStatus*)> kReleaseStatus{93};
inline constexpr Entry<void(OrtTensorTypeAndShapeInfo*)> kReleaseShape{99};
inline constexpr Entry<OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t,
                                  void*)>
    kParallelFor{274};

}  // namespace tome::engines::ort

"""fastopt.h, the C interface, for ``cimport fastopt``.

The header is its manual; docs/c-api.md has more.

``fo_import()`` returns the table of functions of the fastopt that is installed.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t


cdef extern from "fastopt.h" nogil:
    enum:
        FO_ABI

    ctypedef int32_t fo_status
    enum:
        FO_OK
        FO_NO_MEMORY
        FO_BAD_POINTER
        FO_BAD_NAME
        FO_BAD_INDEX
        FO_BAD_VALUE
        FO_INCOMPLETE
        FO_NONFINITE
        FO_UNSUPPORTED

    ctypedef int32_t fo_dtype
    enum:
        FO_F32
        FO_F64
        FO_BF16
        FO_F16
        FO_8BIT_UNSIGNED
        FO_8BIT_SIGNED

    ctypedef int32_t fo_rounding
    enum:
        FO_NEAREST
        FO_STOCHASTIC

    ctypedef int32_t fo_semantics
    enum:
        FO_TORCH
        FO_KERAS

    ctypedef int32_t fo_clip
    enum:
        FO_NO_CLIP
        FO_CLIP_VALUE
        FO_CLIP_NORM
        FO_GLOBAL_CLIP_NORM

    ctypedef int32_t fo_nonfinite
    enum:
        FO_PROPAGATE
        FO_SKIP
        FO_RAISE

    ctypedef struct fo_array:
        uint32_t size
        fo_dtype dtype
        void *data
        void *scales
        void *master
        const int64_t *rows
        int64_t n_rows
        int64_t row_size
        uint64_t seed
        fo_rounding rounding
        int32_t reserved[3]

    fo_array fo_dense(fo_dtype dtype, void *data)

    ctypedef struct fo_options:
        uint32_t size
        fo_semantics semantics
        fo_clip clip
        fo_nonfinite nonfinite
        double clip_limit
        double loss_scale
        double ema_decay
        int32_t ema_starts
        int32_t zero_grad
        int32_t num_threads
        int32_t accumulate

    ctypedef struct fo_result:
        uint32_t size
        int32_t threads
        int32_t has_norm
        int32_t skipped
        int32_t accumulated
        int32_t reserved
        int64_t nonfinite_param
        double grad_norm

    ctypedef struct fo_optimizer:
        pass

    ctypedef struct fo_api:
        uint32_t abi
        uint32_t size
        const char *(*last_error)() noexcept nogil
        const char *(*rule_name)(int32_t j) noexcept nogil
        const char *(*hyper_name)(const char *rule, int32_t j) noexcept nogil
        const char *(*state_name)(const char *rule, int32_t j) noexcept nogil
        fo_status (*create)(
            const char *rule, int32_t n_groups, int64_t n_params, fo_optimizer **opt
        ) noexcept nogil
        void (*destroy)(fo_optimizer *opt) noexcept nogil
        fo_status (*set_hyper)(
            fo_optimizer *opt, int32_t group, const char *name, double value
        ) noexcept nogil
        fo_status (*get_hyper)(
            const fo_optimizer *opt, int32_t group, const char *name, double *value
        ) noexcept nogil
        fo_status (*uses_state)(
            const fo_optimizer *opt, int32_t group, const char *name, int32_t *uses
        ) noexcept nogil
        fo_status (*set_options)(fo_optimizer *opt, const fo_options *options) noexcept nogil
        fo_status (*set_param)(
            fo_optimizer *opt, int64_t i, int32_t group, int64_t size, const fo_array *param,
            int64_t *step
        ) noexcept nogil
        fo_status (*set_state)(
            fo_optimizer *opt, int64_t i, const char *name, const fo_array *state
        ) noexcept nogil
        fo_status (*set_average)(
            fo_optimizer *opt, int64_t i, const fo_array *average
        ) noexcept nogil
        fo_status (*set_sum)(
            fo_optimizer *opt, int64_t i, const fo_array *sum, int32_t holds
        ) noexcept nogil
        fo_status (*set_grad)(fo_optimizer *opt, int64_t i, const fo_array *grad) noexcept nogil
        fo_status (*set_accumulated)(fo_optimizer *opt, int32_t steps) noexcept nogil
        fo_status (*step)(fo_optimizer *opt, fo_result *result) noexcept nogil
        fo_status (*set_num_threads)(int32_t n) noexcept nogil
        int32_t (*get_num_threads)() noexcept nogil
        fo_status (*set_threading_layer)(const char *name) noexcept nogil
        const char *(*get_threading_layer)() noexcept nogil
        fo_status (*set_begun)(
            fo_optimizer *opt, int64_t i, const char *name, int32_t begun
        ) noexcept nogil
        fo_status (*get_begun)(
            const fo_optimizer *opt, int64_t i, const char *name, int32_t *begun
        ) noexcept nogil

    const fo_api *fo_get_api()


cdef extern from "fastopt.h":
    const fo_api *fo_import() except NULL

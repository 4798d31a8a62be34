"""The inside of the C core, as far as the Cython module uses it; src_c/core.h is the manual."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from fastopt cimport (
    FO_8BIT_SIGNED,
    FO_8BIT_UNSIGNED,
    FO_BAD_INDEX,
    FO_BF16,
    FO_F16,
    FO_F32,
    FO_F64,
    FO_OK,
    FO_RAISE,
    fo_clip,
    fo_dtype,
    fo_get_api,
    fo_nonfinite,
    fo_semantics,
    fo_status,
)


cdef extern from "core.h" nogil:
    enum:
        FO_BLOCK
        FO_SCALED
        FO_MAX_SLOTS
        FO_MAX_HYPERS
    unsigned FO_SLOT(int j)
    ctypedef enum fo_layer:
        FO_LAYERS
    ctypedef struct fo_pool:
        pass
    ctypedef struct fo_rule:
        const char *name
        const char *const *hyper_names
        const double *lows
        const double *highs
        const char *const *slot_names
    const fo_rule fo_rules[]
    const int fo_rule_count
    const fo_rule *fo_find_rule(const char *name)
    bint fo_rule_uses_slot(const fo_rule *rule, const double *hypers, int slot)
    bint fo_rule_slot_begins(const fo_rule *rule, int slot)
    bint fo_rule_slot_unsigned(const fo_rule *rule, int slot)
    bint fo_rule_slot_exact(const fo_rule *rule, int slot)
    bint fo_rule_slot_by_row(const fo_rule *rule, int slot)
    bint fo_rule_slot_number(const fo_rule *rule, int slot)

    enum:
        FO_BF16_SPLIT
        FO_F16_MASTER
    ctypedef struct fo_dtypes:
        pass
    fo_dtypes fo_one_dtype(fo_dtype dtype)
    void fo_decode(fo_dtype dtype, int64_t n, float *to, const void *from_, const void *beside)
    void fo_encode(fo_dtype dtype, int64_t n, void *to, const float *from_, void *beside)

    ctypedef struct fo_row_log:
        int64_t n
        int64_t current
    bint fo_row_log_prepare(fo_row_log *log, int64_t n_rows)
    void fo_row_log_clear(fo_row_log *log)
    void fo_row_log_free(fo_row_log *log)

    ctypedef struct fo_tensor:
        void *param
        void *slot[FO_MAX_SLOTS]
        void *ema
        void *sum
        bint has_sum
        unsigned fresh
        int64_t *step
        int64_t size
        int64_t width
        fo_dtypes dtype
        uint8_t param_dtype "dtype.of.param"
        uint8_t slot_dtype "dtype.of.slot" [FO_MAX_SLOTS]
        uint8_t grad_dtype "dtype.of.grad"
        int32_t group
        fo_row_log *log
        void *grad
        int32_t grad_ndim
        const Py_ssize_t *grad_shape
        const Py_ssize_t *grad_strides
        int64_t row_size
        int64_t n_indices
        const int64_t *indices
    bint fo_has_scales(const fo_tensor *tensor)
    ctypedef unsigned char c_bool "bool"
    ctypedef struct fo_step_args:
        fo_semantics semantics
        fo_clip clip
        double clip_limit
        fo_nonfinite nonfinite
        double loss_scale
        int64_t accumulate
        bint add
        double ema_decay
        bint ema_starts
        bint zero_grad
        int max_threads
        const double *squares
        bint exact
        const fo_pool *pool
    ctypedef struct fo_step_result:
        double grad_norm
        bint has_norm
        bint skipped
        int64_t first_skipped
        int threads
    ctypedef struct fo_coding:
        void *beside[1 + FO_MAX_SLOTS]
        unsigned stochastic
        uint64_t seed
        int64_t index
        int64_t first
    ctypedef struct fo_plan:
        pass
    fo_plan *fo_plan_create(const fo_rule *rule, int32_t n_groups, int64_t n_tensors)
    void fo_plan_destroy(fo_plan *plan)
    fo_tensor *fo_plan_tensor(fo_plan *plan, int64_t i)
    fo_coding *fo_plan_coding(fo_plan *plan, int64_t i)
    double *fo_plan_hypers(fo_plan *plan, int32_t group)
    fo_status fo_plan_prepare(fo_plan *plan)
    fo_status fo_plan_take_rows(fo_plan *plan, int64_t *tensor, int64_t *at)
    fo_status fo_plan_refresh(fo_plan *plan, int64_t i, const int64_t *indices, int64_t n_indices,
                              const fo_step_args *args, int64_t *at)
    int64_t fo_plan_size(const fo_plan *plan)
    int64_t fo_plan_blocks(const fo_plan *plan)
    void fo_plan_scan(fo_plan *plan, const fo_step_args *args, double *sums, c_bool *finite) nogil
    void fo_plan_step(fo_plan *plan, const fo_step_args *args, fo_step_result *result)

    void fo_ordered_mean(fo_dtype dtype, int64_t n, void *to, int count, const void **arrays,
                         const fo_dtype *stored) nogil
    void fo_batch_mean(fo_dtype dtype, int64_t n, void *to, const void *sum, const void *grad,
                       fo_dtype stored, double scale, double divisor) nogil

    ctypedef struct fo_bandwidth_tensor:
        void *updated[1 + FO_MAX_SLOTS]
        int n_updated
        const void *read
        int64_t words
    void fo_bandwidth_run(const fo_bandwidth_tensor *tensors, int64_t n_tensors, uint32_t taken,
                          int threads)

    int fo_get_num_threads()
    void fo_set_num_threads(int n)
    int fo_isa_count()
    const char *fo_isa_name(int i)
    bint fo_isa_supported(int i)
    int fo_isa_active()
    bint fo_isa_select(const char *name)
    const char *fo_compiler()
    bint fo_layer_available(fo_layer layer)
    const char *fo_layer_name(fo_layer layer)
    fo_layer fo_layer_active()
    bint fo_layer_select(const char *name)
    int fo_openmp_processors()
    void fo_note_fork()

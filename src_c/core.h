/* The inside of the C core, for the core itself, its bridge to Python, and tests. (For everyone else
 * there is fastopt.h: less of it, checked, and stable.) This header is the manual.
 *
 * The caller owns every array; a plan borrows them:
 *
 *     fo_plan *plan = fo_plan_create(fo_find_rule("adam"), n_groups, n_tensors);
 *     for each tensor i: fill *fo_plan_tensor(plan, i), all but what is bound at each step;
 *     for each group j:  fill fo_plan_hypers(plan, j), in the order of fo_rule.hyper_names;
 *     if (fo_plan_prepare(plan) != FO_OK) ...
 *     for each step: bind every tensor's grad, then fo_plan_step(plan, &args, &result);
 *     fo_plan_destroy(plan);
 *
 * fo_plan_step checks nothing that its caller can check: pointers are valid, arrays dense and apart
 * (a gradient may be exactly its own parameter). It allocates nothing and cannot fail: it updates
 * everything, or (nonfinite) nothing. Bits do not depend on the number of threads or on the
 * instruction set. One plan serves one thread at a time; different plans are independent. */
#ifndef FO_CORE_H
#define FO_CORE_H

#include "fastopt.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FO_BLOCK 4096    /* elements that a loop works through while they are in cache */
#define FO_MAX_SLOTS 3   /* state arrays of a parameter */
#define FO_MAX_HYPERS 12 /* hyperparameters of a rule */
#define FO_MAX_CONSTS 12 /* constants of one step of a rule */
#define FO_MAX_THREADS 1024
#define FO_SLOT(j) (1u << (j)) /* in a set of slots */
#define FO_SCALED 64 /* elements that have a scale in common, where they are stored in 8 bits */

/* The threading layers: the library's own threads, regions of the OpenMP runtime's, or the caller
 * alone. One is active, for all steps of the process; the first that there is, from the start. */
typedef enum { FO_TEAM, FO_OPENMP, FO_SERIAL, FO_LAYERS } fo_layer;

/* Threads that something else in the program keeps: functions as OpenMP's runtimes have them. */
typedef struct {
    /* GOMP_parallel: runs act(context) in so many threads at once, the caller's among them, or in
     * fewer, and returns when all have. Flags are 0. */
    void (*run)(void (*act)(void *), void *context, unsigned threads, unsigned flags);
    int (*rank)(void); /* omp_get_thread_num: of the thread that acts; from run to run the same */
} fo_pool;

/* ---- how elements are stored ------------------------------------------------------------------ */

/* Types of parameters that have a second array beside them, which no caller names: it gives the
 * array. What the caller's type is becomes one of these. */
enum { FO_BF16_SPLIT = FO_8BIT_SIGNED + 1, FO_F16_MASTER };

typedef struct {
    const char *name;
    size_t bytes;        /* of an element */
    fo_dtype arithmetic; /* the type that rules compute in: itself, or what it is decoded to */
    size_t beside;       /* bytes of a second array, */
    int64_t per;         /* for each so many elements; 0: there is none */
} fo_storage;

extern const fo_storage fo_storages[]; /* by fo_dtype */
extern const int fo_storage_count;

/* Decodes to floats, and encodes from them, n elements that are stored as one of the types that do not
 * compute in double; with what they have beside them. Rounds to nearest. */
void fo_decode(fo_dtype dtype, int64_t n, float *to, const void *from, const void *beside);
void fo_encode(fo_dtype dtype, int64_t n, void *to, const float *from, void *beside);

/* The types of a tensor's arrays; the arithmetic of all is the same. */
typedef union {
    struct {
        uint8_t param, slot[FO_MAX_SLOTS], ema, sum, grad, unused;
    } of;
    uint64_t all; /* to compare them at once: every byte of it is named above */
} fo_dtypes;

/* All of one type. */
static inline fo_dtypes fo_one_dtype(fo_dtype dtype)
{
    const uint8_t d = (uint8_t)dtype;
    return (fo_dtypes){.of = {d, {d, d, d}, d, d, d, 0}};
}

/* ---- rules ---------------------------------------------------------------------------------- */

typedef struct {
    const char *name;
    const char *const *hyper_names; /* NULL-terminated; hyperparameters are doubles in this order */
    const double *defaults, *lows, *highs; /* of each; a NaN as `high`: it is 0 or 1 */
    const char *const *slot_names;         /* NULL-terminated */
    int slot_needs[FO_MAX_SLOTS];          /* for fo_rule_uses_slot */
    int (*variant)(const double *hypers);
    void (*consts)(const double *hypers, fo_semantics semantics, int64_t t, unsigned fresh,
                   double *consts);
} fo_rule;

extern const fo_rule fo_rules[];
extern const int fo_rule_count;

const fo_rule *fo_find_rule(const char *name); /* NULL: no such rule */

/* Names by number and numbers by name, as fastopt.h's functions of these names give them; NULL and
 * -1: none. */
const char *fo_rule_name(int32_t j);
const char *fo_hyper_name(const char *rule, int32_t j);
const char *fo_state_name(const char *rule, int32_t j);
int fo_place_of(const char *const *names, const char *name);

/* The constants of step number t (the first is 1), weight decay's and the rule's, for a parameter
 * with these fresh slots and this number, if the rule has one (see fo_tensor). */
void fo_rule_consts(const fo_rule *rule, const double *hypers, fo_semantics semantics, int64_t t,
                    unsigned fresh, double number, double *consts);

/* Whether a value is in the range of hyperparameter j. A NaN never is. */
bool fo_rule_takes(const fo_rule *rule, int j, double value);

/* Whether a step with these hyperparameters touches the slot. */
bool fo_rule_uses_slot(const fo_rule *rule, const double *hypers, int slot);

/* Whether a step of this variant leaves all slots as they are where gradients are zero. */
bool fo_rule_slots_stay(const fo_rule *rule, int variant);

/* Whether the rule has to know of a slot if a step has written it yet. */
bool fo_rule_slot_begins(const fo_rule *rule, int slot);

/* Whether a slot has one value for each row of the parameter; and what a row's step makes of it and of
 * the constants, given the mean of the row's squared gradients. */
bool fo_rule_slot_by_row(const fo_rule *rule, int slot);
void fo_rule_row(const fo_rule *rule, double mean, double *value, double *consts);

/* Whether a slot's values are never negative; and whether it keeps float32 where other slots are stored
 * in fewer bits. */
bool fo_rule_slot_unsigned(const fo_rule *rule, int slot);
bool fo_rule_slot_exact(const fo_rule *rule, int slot);

/* Whether a slot is no array but one double, whatever the parameter is. */
bool fo_rule_slot_number(const fo_rule *rule, int slot);

/* ---- rows that miss steps --------------------------------------------------------------------- */

/* A step in which rows without a gradient had one of zero, and which they have not taken yet. */
typedef struct {
    double consts[FO_MAX_CONSTS], gscale, gmax;
    int64_t step;
    int32_t variant;
    bool rests; /* it leaves rows as they are whose slots are zeros */
} fo_missed;

#define FO_ROW_LOG 1024 /* steps that are remembered */

/* The steps that rows of a tensor have missed: they are taken as soon as a row is needed, or before
 * they would be forgotten. All are zeros at first. It does not depend on a plan. */
typedef struct {
    fo_missed *steps; /* the last ones, number j at j % FO_ROW_LOG */
    uint16_t *taken;  /* of each row: how many it has taken, modulo 2^16 */
    int64_t n_rows;
    int64_t n;       /* steps so far */
    int64_t current; /* steps that all rows have taken */
    int64_t swept;   /* the row that is looked at next, so that none falls behind too far */
} fo_row_log;

/* Makes room for the rows of a tensor: false if there is no memory. */
bool fo_row_log_prepare(fo_row_log *log, int64_t n_rows);
void fo_row_log_clear(fo_row_log *log); /* no row has missed anything */
void fo_row_log_free(fo_row_log *log);

/* ---- plans ---------------------------------------------------------------------------------- */

typedef struct {
    void *param;
    /* In the order of slot_names. NULL: not kept, then not used either. Of a slot that is a number,
     * a double, whose dtype below has no meaning and is the arithmetic's. */
    void *slot[FO_MAX_SLOTS];
    void *ema;     /* NULL: no average */
    void *sum;     /* of the gradients of micro-batches; NULL: none are summed */
    int64_t *step; /* steps taken so far; a step with a gradient adds one */
    int64_t size;  /* elements */
    int64_t width; /* of a row, where a slot in use has one value for each */
    fo_dtypes dtype;
    int32_t group;
    fo_row_log *log; /* prepared; NULL: rows without a gradient do not take part in a step */

    /* bound at each step */
    void *grad; /* NULL: no gradient, the parameter is left out */
    /* 0: grad is laid out as the parameter. Otherwise its shape and its strides in bytes, both in
     * the parameter's memory order, outermost axis first. */
    int32_t grad_ndim;
    /* not bound, but kept by steps: */
    bool has_sum;   /* whether `sum` holds any gradient yet */
    unsigned fresh; /* past the first step: the slots that begin, and have not begun yet */
    const ptrdiff_t *grad_shape, *grad_strides;
    /* bound with the gradient: 0, or it is of rows of so many elements each, and laid out as they
     * are. The parameter's row indices[j] has number j of them; of a row that is given more than
     * once, their sum. */
    int64_t row_size;
    int64_t n_indices;
    const int64_t *indices;
} fo_tensor;

/* Whether any state is in 8 bits, of which FO_SCALED elements have a scale in common. (Then rows, too,
 * have to be of a multiple of so many.) */
static inline bool fo_has_scales(const fo_tensor *t)
{
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        if (fo_storages[t->dtype.of.slot[j]].per != 0)
            return true;
    return false;
}

typedef struct {
    fo_semantics semantics;
    fo_clip clip;
    double clip_limit;
    fo_nonfinite nonfinite;
    double loss_scale;
    int64_t accumulate; /* micro-batches whose mean is the gradient, of tensors with sums */
    bool add;           /* this one is not the last: gradients enter the sums, and that is all */
    double ema_decay;
    bool ema_starts; /* this step's average is a copy */
    bool zero_grad;
    int max_threads;
    /* Where a plan has parts of tensors: for each, the sum of the squares of all of its unscaled
     * gradient, that its clipping goes by; it has no value that is not finite. NULL: a step finds
     * that out itself. */
    const double *squares;
    bool exact;          /* for tests: exactly max_threads take part, whatever the size */
    const fo_pool *pool; /* of max_threads, that FO_TEAM may use for large steps; NULL: none */
} fo_step_args;

typedef struct {
    double grad_norm; /* of the unscaled gradients; meaningful where has_norm */
    bool has_norm;
    bool skipped;          /* a gradient was not finite, and nothing was updated */
    int64_t first_skipped; /* the first tensor with such a gradient */
    int threads;           /* that took part */
} fo_step_result;

/* What a tensor needs besides if something of it is stored in fewer bits than rules compute in. Arrays
 * are numbered here: 0 is the parameter, 1 + j is slot j. */
typedef struct {
    void *beside[1 + FO_MAX_SLOTS]; /* second arrays, of types that have one */
    unsigned stochastic;            /* FO_SLOT(n): array n is rounded up or down at random */
    uint64_t seed;                  /* random bits depend on it, */
    int64_t index;                  /* on the parameter's number in the whole optimizer, */
    int64_t first;                  /* and on elements', of which the first has this one */
} fo_coding;

/* What steps go over: elements offset to offset + size of a tensor. Their gradient is the tensor's
 * from element `grad` on, counted in the parameter's memory order. (So a gradient may be of some
 * rows alone. Elements that are in no piece stay as they are; for an average of these, too, let them
 * be pieces of a second tensor over the same arrays, with its own counter and no gradient.) */
typedef struct {
    int64_t tensor, offset, size, grad;
} fo_piece;

typedef struct fo_plan fo_plan;

fo_plan *fo_plan_create(const fo_rule *rule, int32_t n_groups, int64_t n_tensors); /* or NULL */
void fo_plan_destroy(fo_plan *plan);
fo_tensor *fo_plan_tensor(fo_plan *plan, int64_t i); /* the next one follows it in memory */
double *fo_plan_hypers(fo_plan *plan, int32_t group);
fo_coding *fo_plan_coding(fo_plan *plan, int64_t i); /* of tensor i; the next one follows it */
/* Has steps go over all tensors, each in one piece: FO_OK or FO_NO_MEMORY. */
fo_status fo_plan_prepare(fo_plan *plan);
/* Has them go over these pieces, which do not overlap. All of a tensor's follow one another. (None ends
 * within a row, where a slot has one value for each.) */
fo_status fo_plan_prepare_pieces(fo_plan *plan, const fo_piece *pieces, int64_t n_pieces);
/* Has the next step go over the rows of each gradient that is of some rows, and over all of other
 * tensors: to be called before it, and before the first one that has no such gradient again.
 * FO_BAD_INDEX: of the rows of tensor `*tensor`, number `*at` does not exist. FO_NO_MEMORY. */
fo_status fo_plan_take_rows(fo_plan *plan, int64_t *tensor, int64_t *at);
/* Has rows of tensor i take the steps that they have missed: those of these numbers, or all rows
 * (NULL). A step does so itself for the rows that its gradient is of; before one with a gradient of
 * all elements, all rows have to be up to date. FO_BAD_INDEX: number `*at` does not exist.
 * FO_NO_MEMORY. */
fo_status fo_plan_refresh(fo_plan *plan, int64_t i, const int64_t *indices, int64_t n_indices,
                          const fo_step_args *args, int64_t *at);
int64_t fo_plan_size(const fo_plan *plan); /* elements, all pieces together */
int64_t fo_plan_blocks(const fo_plan *plan);
/* What a step would find out first: of each block of its pieces the sum of the squares of its unscaled
 * gradient, and whether all of its values are finite. (Zero and true where there is no gradient.) */
void fo_plan_scan(fo_plan *plan, const fo_step_args *args, double *sums, bool *finite);
void fo_plan_step(fo_plan *plan, const fo_step_args *args, fo_step_result *result);

/* ---- gradients of several processes, or of several micro-batches ------------------------------ */

/* Puts the mean of arrays, added up in the order given, to `to`, in a type that rules compute in; the
 * arrays are stored as any that it has all values of. */
void fo_ordered_mean(fo_dtype type, int64_t n, void *to, int count, const void *const *arrays,
                     const fo_dtype *stored);

/* Puts (sum + scale*grad) / divisor there, as a step does that accumulates; either may be NULL. */
void fo_batch_mean(fo_dtype type, int64_t n, void *to, const void *sum, const void *grad,
                   fo_dtype stored, double scale, double divisor);

/* ---- the bandwidth bound of a step, to measure against --------------------------------------- */

typedef struct {
    void *updated[1 + FO_MAX_SLOTS]; /* arrays that are read and written */
    int n_updated;                   /* 1 at least */
    const void *read;                /* one that is read */
    int64_t words;                   /* of each, in units of 4 bytes */
} fo_bandwidth_tensor;

/* Moves the bytes of a step over these arrays: each updated word takes up (exclusive or) the bits
 * `taken` of the one that is read. With 0 all stays as it is, but no compiler knows. */
void fo_bandwidth_run(const fo_bandwidth_tensor *tensors, int64_t n_tensors, uint32_t taken,
                      int threads);

/* ---- the machine ---------------------------------------------------------------------------- */

void fo_init(void);             /* once, before anything else; fo_get_api does it too */
int fo_get_num_threads(void);   /* the most that a step may use, unless it says otherwise */
void fo_set_num_threads(int n); /* 1 to FO_MAX_THREADS */
int fo_isa_count(void);
const char *fo_isa_name(int i); /* compiled in, weakest first */
bool fo_isa_supported(int i);   /* and runnable here */
int fo_isa_active(void);
bool fo_isa_select(const char *name); /* false: not supported, nothing changed */
const char *fo_compiler(void);

bool fo_layer_available(fo_layer layer);
const char *fo_layer_name(fo_layer layer);
fo_layer fo_layer_active(void);
bool fo_layer_select(const char *name); /* false: no such layer here */
int fo_openmp_processors(void); /* that its threads may have, where that layer is available */
void fo_note_fork(void); /* the process is a child whose parent may have used OpenMP unseen */

#endif

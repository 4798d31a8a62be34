/* The inside of a plan, and of a step over it: what plan.c, gradient.c and step.c share. */
#ifndef FO_PLAN_H
#define FO_PLAN_H

#include "kernels.h"
#include "rows.h"
#include "rule.h"
#include "tuner.h"

#include <string.h>

#define MIN_PER_THREAD (1 << 13) /* elements; no thread can pay for fewer */

/* What a step makes of a tensor before it writes anything. */
typedef struct {
    int64_t size; /* elements that are in pieces, since these were prepared */
    fo_update *update;
    const double *consts;
    const fo_coding *coding;
    const fo_rows *rows; /* that the gradient is of; NULL: it is of all elements */
    double gscale, gmax;
    int64_t step;  /* its number, from 1 */
    uint32_t item; /* bytes of an element, in the type that the rule computes in */
    uint8_t type;  /* that type */
    bool coded;    /* something is stored otherwise */
    uint8_t variant;
    uint8_t slots;  /* that the loop touches */
    uint8_t by_row; /* 1 + the slot that has one value a row; 0: none has */
} tensor_work;

/* A piece as passes go over it. */
typedef struct {
    const fo_tensor *tensor;
    tensor_work *work;
    int64_t begin, end; /* its elements of the tensor */
    int64_t to_grad;    /* from an element of the tensor to its gradient's */
} piece;

/* What the tensors of a group have in common at a step. */
typedef struct {
    fo_update *update[2]; /* by the type that it computes in */
    uint8_t variant, slots, by_row;
    bool maximize;
    const double *consts; /* computed last, and for what; NULL: not yet */
    int64_t step;
    unsigned fresh;
    double number; /* as it was */
} group_work;

struct fo_plan {
    const fo_rule *rule;
    unsigned begins; /* the slots of the rule that do */
    int number;      /* the slot that is one; -1: none */
    int32_t n_groups;
    int64_t n_tensors, n_pieces, n_blocks, size;
    fo_tensor *tensors;
    double *hypers;            /* FO_MAX_HYPERS a group */
    double *consts;            /* FO_MAX_CONSTS a tensor */
    tensor_work *tensor_works; /* one a tensor */
    group_work *group_works;   /* one a group */
    fo_coding *codings;        /* one a tensor */
    fo_rows *rows;             /* one a tensor, once a gradient has been of some; or NULL */
    int64_t piece_room;        /* pieces that the next two are for */
    piece *pieces;             /* all of a tensor's follow one another */
    int64_t *first_block;      /* of each piece, and n_blocks at the end */
    fo_tuner tuners[2]; /* how many threads have paid; [1]: where gradients were only added */
    int64_t block_room; /* blocks that the next two are for */
    double *block_sum;  /* of squares, unscaled gradients */
    bool *block_finite; /* whether all its values are */
};

/* The slots that a variant's loop touches. */
static inline unsigned slots_of(const fo_rule *rule, int variant)
{
    unsigned slots = 0;
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        if (fo_slot_in_loop(rule->slot_needs[j], variant))
            slots |= FO_SLOT(j);
    return slots;
}

/* 1 + the slot that has one value for each row; 0: none that the variant uses has. */
static inline uint8_t slot_by_row(const fo_rule *rule, int variant)
{
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        if (rule->slot_needs[j] & BY_ROW && fo_slot_used(rule->slot_needs[j], variant))
            return (uint8_t)(1 + j);
    return 0;
}

/* The type that a tensor's rule computes in. (Most tensors have all in one such type.) */
static inline fo_dtype arithmetic_of(const fo_tensor *t)
{
    return t->dtype.all == 0 ? FO_F32 : fo_storages[t->dtype.of.param].arithmetic;
}

/* Whether something that steps write is stored otherwise. (0 is float32 for all.) */
static inline bool is_coded(const fo_tensor *t, fo_dtype type)
{
    fo_dtypes written = t->dtype;
    written.of.grad = (uint8_t)type;
    return t->dtype.all != 0 && written.all != fo_one_dtype(type).all;
}

/* Notes how a tensor is stored. */
static inline void describe(const fo_tensor *t, tensor_work *w)
{
    const fo_dtype type = arithmetic_of(t);
    w->item = type == FO_F32 ? sizeof(float) : sizeof(double);
    w->type = (uint8_t)type;
    w->coded = is_coded(t, type);
}

/* One step. */
typedef struct {
    fo_plan *plan;
    const fo_step_args *args;
    fo_step_result *result;
    const fo_table *table;
    double scale; /* 1 / loss_scale */
} fo_step;

/* An array of a tensor. */
typedef struct {
    fo_dtype dtype;
    void *data, *beside;
} array;

/* A tensor's arrays: 0 is the parameter, 1 + j is slot j. */
static inline array array_of(const fo_tensor *t, const fo_coding *coding, int number)
{
    if (number == 0)
        return (array){t->dtype.of.param, t->param, coding->beside[0]};
    return (array){t->dtype.of.slot[number - 1], t->slot[number - 1], coding->beside[number]};
}

/* What an array has beside its elements from `offset` on, if it has anything. */
static inline void *beside_at(const array *a, int64_t offset)
{
    const fo_storage *storage = &fo_storages[a->dtype];
    return storage->per ? (char *)a->beside + (size_t)(offset / storage->per) * storage->beside
                        : NULL;
}

/* n elements of an array, from `offset` on: where they are, if rules compute in that type; or else
 * decoded, in the buffer. */
static inline void *decoded(const fo_step *s, const array *a, int64_t offset, int64_t n,
                            void *buffer)
{
    const char *at = (const char *)a->data + (size_t)offset * fo_storages[a->dtype].bytes;
    if (!s->table->load[a->dtype])
        return (void *)at;
    s->table->load[a->dtype](n, buffer, at, beside_at(a, offset));
    return buffer;
}

/* Puts n elements, in the type that rules compute in, to where `decoded` has them from. */
static inline void put(const fo_step *s, const array *a, int64_t offset, int64_t n,
                       const void *elements, const uint16_t *random)
{
    const size_t item = fo_storages[a->dtype].bytes;
    char *at = (char *)a->data + (size_t)offset * item;
    if (s->table->store[a->dtype])
        s->table->store[a->dtype](n, at, elements, beside_at(a, offset), random);
    else if (elements != at)
        memcpy(at, elements, (size_t)n * item);
}

static inline array sums_of(const fo_tensor *t) { return (array){t->dtype.of.sum, t->sum, NULL}; }

/* Whether this step has a gradient for the tensor, of this micro-batch or of an earlier one. */
static inline bool has_gradient(const fo_step *s, const fo_tensor *t)
{
    return t->grad || t->row_size || (t->has_sum && !s->args->add);
}

/* What the given gradient is still to be multiplied by; sums have it behind them. */
static inline double unscale(const fo_step *s, const fo_tensor *t) { return t->sum ? 1 : s->scale; }

/* Puts n elements, which are stored as another type, into one that rules compute in and that has all
 * their values. */
void fo_convert(const fo_table *table, fo_dtype type, fo_dtype stored, int64_t n, void *to,
                const void *from);

/* ---- a block's gradient: n elements from `at` on, in the parameter's memory order; sums are of the
 * elements from `offset` on ---------------------------------------------------------------------- */

/* Copies and decodes them into the buffer, from a gradient that is laid out or stored otherwise;
 * returns that. */
const void *fo_read_grad(const fo_step *s, const fo_tensor *t, int64_t at, int64_t n, char *buffer);

/* Their sum over micro-batches so far; at the last one, their mean. */
const void *fo_mean_grad(const fo_step *s, const fo_tensor *t, int64_t offset, int64_t at,
                         int64_t n, char *buffer);

/* Zeroes them in place. */
void fo_zero_grad(const fo_tensor *t, int64_t at, int64_t n);

/* As the rule takes them: in contiguous memory, in the type that it computes in. */
static inline const void *effective_grad(const fo_step *s, const fo_tensor *t, const tensor_work *w,
                                         int64_t offset, int64_t at, int64_t n, char *buffer)
{
    if (t->sum)
        return fo_mean_grad(s, t, offset, at, n, buffer);
    if (t->grad_ndim == 0 && t->dtype.of.grad == w->type)
        return (const char *)t->grad + (size_t)at * w->item;
    return fo_read_grad(s, t, at, n, buffer);
}

#endif

/* The inside of a plan, and of a step over it: what plan.c, gradient.c and step.c share. */
#ifndef FO_PLAN_H
#define FO_PLAN_H

#include "kernels.h"
#include "tuner.h"

/* What a step makes of a tensor before it writes anything. */
typedef struct {
    fo_update *update;
    const double *consts;
    double gscale;
} tensor_work;

/* What the tensors of a group have in common at a step. */
typedef struct {
    fo_update *update[2]; /* by dtype */
    bool maximize;
    unsigned skipped;     /* slots that begin, but not with this step */
    const double *consts; /* computed last, and for what; NULL: not yet */
    int64_t step;
    unsigned fresh;
} group_work;

struct fo_plan {
    const fo_rule *rule;
    bool begins; /* whether the rule has a slot that does */
    int32_t n_groups;
    int64_t n_tensors, n_blocks, size;
    fo_tensor *tensors;
    double *hypers;            /* FO_MAX_HYPERS a group */
    double *consts;            /* FO_MAX_CONSTS a tensor */
    tensor_work *tensor_works; /* one a tensor */
    group_work *group_works;   /* one a group */
    int64_t *first_block;      /* of each tensor, and n_blocks at the end */
    fo_tuner tuners[2]; /* how many threads have paid; [1]: where gradients were only added */
    int64_t block_room; /* blocks that the next two are for */
    double *block_sum;  /* of squares, unscaled gradients */
    bool *block_finite; /* whether all its values are */
};

static const size_t fo_item_size[] = {sizeof(float), sizeof(double)};

/* One step. */
typedef struct {
    fo_plan *plan;
    const fo_step_args *args;
    fo_step_result *result;
    const fo_table *table;
    double scale; /* 1 / loss_scale */
} fo_step;

/* Whether this step has a gradient for the tensor, of this micro-batch or of an earlier one. */
static inline bool has_gradient(const fo_step *s, const fo_tensor *t)
{
    return t->grad || (t->has_sum && !s->args->add);
}

/* What the given gradient is still to be multiplied by; sums have it behind them. */
static inline double unscale(const fo_step *s, const fo_tensor *t) { return t->sum ? 1 : s->scale; }

/* ---- a block's gradient: n elements from `offset` on, in the parameter's memory order ------------ */

/* Copies them into the buffer, from a gradient that is laid out otherwise; returns that. */
const void *fo_gather_grad(const fo_tensor *t, int64_t offset, int64_t n, char *buffer);

/* Their sum over micro-batches so far; at the last one, their mean. */
const void *fo_mean_grad(const fo_step *s, const fo_tensor *t, int64_t offset, int64_t n,
                         char *buffer);

/* Zeroes them in place. */
void fo_zero_grad(const fo_tensor *t, int64_t offset, int64_t n);

/* As they are given, as contiguous memory. */
static inline const void *contiguous_grad(const fo_tensor *t, int64_t offset, int64_t n,
                                          char *buffer)
{
    if (t->grad_ndim == 0)
        return (const char *)t->grad + (size_t)offset * fo_item_size[t->dtype];
    return fo_gather_grad(t, offset, n, buffer);
}

/* As the rule takes them. */
static inline const void *effective_grad(const fo_step *s, const fo_tensor *t, int64_t offset,
                                         int64_t n, char *buffer)
{
    return t->sum ? fo_mean_grad(s, t, offset, n, buffer) : contiguous_grad(t, offset, n, buffer);
}

#endif

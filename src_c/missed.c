/* Rows that miss steps. A gradient of some rows is zero in the others, which a step of most rules
 * changes nevertheless. A log has what such steps were, and rows take them later, one after the
 * other: as soon as their gradient is not zero, or somebody asks for them. Each step also has a few
 * rows catch up in turn, so that none falls behind further than the log reaches. */
#define _POSIX_C_SOURCE 199309L /* as platform.h needs it */
#include "missed.h"
#include "platform.h"
#include "update.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

bool fo_row_log_prepare(fo_row_log *log, int64_t n_rows)
{
    if (log->taken)
        return true;
    log->taken = calloc((size_t)n_rows, sizeof *log->taken);
    log->steps = calloc(FO_ROW_LOG, sizeof *log->steps);
    log->n_rows = n_rows;
    if (log->taken && log->steps)
        return true;
    fo_row_log_free(log);
    return false;
}

void fo_row_log_clear(fo_row_log *log)
{
    log->n = log->current = log->swept = 0;
    if (log->taken)
        memset(log->taken, 0, (size_t)log->n_rows * sizeof *log->taken);
}

void fo_row_log_free(fo_row_log *log)
{
    free(log->steps);
    free(log->taken);
    *log = (fo_row_log){0};
}

/* ---- rows catch up --------------------------------------------------------------------------- */

typedef struct {
    const fo_step *step;
    const fo_tensor *tensor;
    tensor_work work;
    const fo_rows *rows; /* those of these numbers, in their order; NULL: */
    int64_t first, end;  /* from this one to before that one */
    int64_t first_block;
} catching_up;

/* Blocks of the tensor, in which rows from `first` on lie. */
static void catch_up_in_blocks(void *work, int64_t begin, int64_t end)
{
    const catching_up *c = work;
    const fo_tensor *t = c->tensor;
    const int64_t size = t->size / t->log->n_rows;
    const fo_fpenv saved = fo_fpenv_enter();
    for (int64_t j = begin; j < end; j++) {
        const fo_row_block *given = c->rows ? &c->rows->blocks[j] : NULL;
        const int64_t number = given ? given->number : c->first_block + j;
        const int64_t from = number * FO_BLOCK;
        const int64_t to = from + FO_BLOCK < t->size ? from + FO_BLOCK : t->size;
        if (given) {
            for (int64_t k = given->first; k < c->rows->n_distinct; k++) {
                if (fo_distinct_row(c->rows, k) * size >= to)
                    break;
                fo_catch_up(c->step, t, &c->work, fo_distinct_row(c->rows, k), from, to);
            }
            continue;
        }
        const int64_t row = from / size;
        for (int64_t r = row > c->first ? row : c->first; r < c->end && r * size < to; r++)
            fo_catch_up(c->step, t, &c->work, r, from, to);
    }
    fo_fpenv_leave(saved);
}

static void catch_up(catching_up *c, fo_crew crew)
{
    const fo_tensor *t = c->tensor;
    fo_row_log *log = t->log;
    const int64_t size = t->size / log->n_rows;
    const fo_passes passes = {NULL, NULL, catch_up_in_blocks};
    const int64_t n_rows = c->rows ? c->rows->n_distinct : c->end - c->first;
    const int64_t behind = log->n - log->current, most = behind < FO_ROW_LOG ? behind : FO_ROW_LOG;
    const double useful = (double)n_rows * (double)size * (double)most / MIN_PER_THREAD;
    int64_t n_blocks = c->rows ? c->rows->n_blocks : 0;
    if (!c->rows) {
        c->first_block = c->first * size / FO_BLOCK;
        n_blocks = (c->end * size - 1) / FO_BLOCK - c->first_block + 1;
    }
    if (!crew.exact && useful < crew.members)
        crew.members = useful > 1 ? (int)useful : 1;
    describe(t, &c->work);
    c->work.coding = &c->step->plan->codings[t - c->step->plan->tensors];
    fo_share(&crew, n_blocks, 1, &passes, c);
    for (int64_t k = 0; k < n_rows; k++)
        log->taken[c->rows ? fo_distinct_row(c->rows, k) : c->first + k] = (uint16_t)log->n;
}

fo_status fo_plan_refresh(fo_plan *plan, int64_t i, const int64_t *indices, int64_t n_indices,
                          const fo_step_args *args, int64_t *at)
{
    fo_tensor tensor = plan->tensors[i];
    fo_row_log *log = tensor.log;
    fo_step_result result = {0};
    const fo_step s = {plan, args, &result, fo_active_table(), 1};
    fo_rows rows = {0};
    catching_up c = {.step = &s, .tensor = &plan->tensors[i], .end = log ? log->n_rows : 0};
    if (!log || !log->taken || tensor.size == 0)
        return FO_OK;
    if (indices) {
        tensor.indices = indices;
        tensor.n_indices = n_indices;
        tensor.row_size = tensor.size / log->n_rows;
        tensor.ema = NULL;
        const fo_status status = fo_rows_sort(&rows, &tensor, at);
        if (status) {
            fo_rows_free(&rows);
            return status;
        }
        c.rows = &rows;
    }
    if (log->n != log->current) {
        const fo_fpenv saved = fo_fpenv_enter();
        catch_up(&c, (fo_crew){fo_layer_active(), args->exact, args->max_threads, NULL});
        fo_fpenv_leave(saved);
    }
    if (!indices)
        log->current = log->n;
    fo_rows_free(&rows);
    return FO_OK;
}

/* ---- steps are logged ------------------------------------------------------------------------ */

/* Whether the step leaves an element as it is that has no gradient, and slots of zero. (It changes a
 * parameter of -0 if it changes any.) */
static bool rests_at_zero(const tensor_work *w)
{
    const double none = 0;
    double elements[1 + FO_MAX_SLOTS] = {0}; /* or floats */
    void *slot[FO_MAX_SLOTS];
    const float negative = -0.0F;
    const double wide = -0.0;
    if (w->consts[L2] != 0 || w->consts[KEEP] != 1)
        return false;
    memcpy(elements, w->type == FO_F32 ? (const void *)&negative : &wide, w->item);
    double before[1 + FO_MAX_SLOTS];
    memcpy(before, elements, sizeof before);
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        slot[j] = &elements[1 + j];
    w->update(1, elements, &none, slot, w->consts, w->gscale, w->gmax);
    return memcmp(before, elements, sizeof before) == 0;
}

static void log_step(const fo_step *s, const fo_tensor *t, const tensor_work *w)
{
    fo_row_log *log = t->log;
    const bool rests = rests_at_zero(w) && !fo_has_scales(t);
    if (rests && fo_rule_slots_stay(s->plan->rule, w->variant))
        return;
    fo_missed *m = &log->steps[log->n % FO_ROW_LOG];
    memcpy(m->consts, w->consts, sizeof m->consts);
    m->gscale = w->gscale;
    m->gmax = w->gmax;
    m->step = w->step;
    m->variant = w->variant;
    m->rests = rests;
    log->n++;
}

/* Has the rows catch up whose turn it is: each has its turn before it has missed all of the log. */
static void sweep(const fo_step *s, const fo_tensor *t, const fo_crew *crew)
{
    fo_row_log *log = t->log;
    const int64_t slice = log->n_rows / (FO_ROW_LOG - 1) + 1;
    if (log->swept >= log->n_rows)
        log->swept = 0;
    const int64_t left = log->n_rows - log->swept, end = log->swept + (slice < left ? slice : left);
    catching_up c = {.step = s, .tensor = t, .first = log->swept, .end = end};
    catch_up(&c, (fo_crew){crew->layer, crew->exact, crew->members, NULL});
    log->swept = end;
}

void fo_log_missed(const fo_step *s, const fo_crew *crew)
{
    if (!s->plan->rows)
        return; /* no gradient has ever been of some rows */
    for (int64_t i = 0; i < s->plan->n_tensors; i++) {
        const fo_tensor *t = &s->plan->tensors[i];
        const tensor_work *w = &s->plan->tensor_works[i];
        if (!t->log || !w->rows)
            continue;
        const int64_t before = t->log->n;
        log_step(s, t, w);
        if (t->log->n == t->log->current)
            continue; /* no row has missed anything */
        for (int64_t k = 0; k < w->rows->n_distinct; k++)
            t->log->taken[fo_distinct_row(w->rows, k)] = (uint16_t)t->log->n;
        if (t->log->n != before)
            sweep(s, t, crew);
    }
}

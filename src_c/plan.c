/* A plan's memory. Its tensors are in pieces, which are cut into blocks of FO_BLOCK elements; these
 * are numbered through all pieces. */
#include "plan.h"
#include <stdlib.h>

fo_plan *fo_plan_create(const fo_rule *rule, int32_t n_groups, int64_t n_tensors)
{
    fo_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return NULL;
    const size_t n = (size_t)n_tensors, groups = (size_t)n_groups;
    plan->rule = rule;
    plan->number = -1;
    for (int j = 0; j < FO_MAX_SLOTS; j++) {
        plan->begins |= fo_rule_slot_begins(rule, j) ? FO_SLOT(j) : 0;
        plan->number = fo_rule_slot_number(rule, j) ? j : plan->number;
    }
    plan->n_groups = n_groups;
    plan->n_tensors = n_tensors;
    plan->tensors = calloc(n + 1, sizeof *plan->tensors);
    plan->hypers = calloc(groups + 1, FO_MAX_HYPERS * sizeof *plan->hypers);
    plan->consts = calloc(n + 1, FO_MAX_CONSTS * sizeof *plan->consts);
    plan->tensor_works = calloc(n + 1, sizeof *plan->tensor_works);
    plan->group_works = calloc(groups + 1, sizeof *plan->group_works);
    plan->codings = calloc(n + 1, sizeof *plan->codings);
    for (size_t i = 0; i < n && plan->tensor_works && plan->codings; i++)
        plan->tensor_works[i].coding = &plan->codings[i];
    if (plan->tensors && plan->hypers && plan->consts && plan->tensor_works && plan->group_works &&
        plan->codings)
        return plan;
    fo_plan_destroy(plan);
    return NULL;
}

/* Makes room for so many pieces, from none on. */
static bool take_pieces(fo_plan *plan, int64_t n)
{
    plan->n_pieces = plan->size = 0;
    for (int64_t i = 0; i < plan->n_tensors; i++) {
        plan->tensor_works[i].size = 0;
        plan->tensor_works[i].rows = NULL;
    }
    if (n < plan->piece_room)
        return true;
    free(plan->pieces);
    free(plan->first_block);
    plan->pieces = calloc((size_t)n + 1, sizeof *plan->pieces);
    plan->first_block = calloc((size_t)n + 1, sizeof *plan->first_block);
    plan->piece_room = plan->pieces && plan->first_block ? n + 1 : 0;
    return plan->piece_room > 0;
}

static void add_piece(fo_plan *plan, const fo_piece *added)
{
    piece *p = &plan->pieces[plan->n_pieces++];
    p->tensor = &plan->tensors[added->tensor];
    p->work = &plan->tensor_works[added->tensor];
    p->begin = added->offset;
    p->end = added->offset + added->size;
    p->to_grad = added->grad - added->offset;
    p->work->size += added->size;
    plan->size += added->size;
}

/* Numbers the pieces' blocks, and makes room for what is kept of each. */
static fo_status number_blocks(fo_plan *plan)
{
    int64_t blocks = 0;
    for (int64_t k = 0; k < plan->n_pieces; k++) {
        const int64_t size = plan->pieces[k].end - plan->pieces[k].begin;
        const fo_rows *rows = plan->pieces[k].work->rows;
        plan->first_block[k] = blocks;
        blocks += rows ? rows->n_blocks : fo_count_blocks(size);
    }
    plan->first_block[plan->n_pieces] = plan->n_blocks = blocks;
    if (blocks < plan->block_room)
        return FO_OK;
    free(plan->block_sum);
    free(plan->block_finite);
    plan->block_sum = calloc((size_t)blocks + 1, sizeof *plan->block_sum);
    plan->block_finite = calloc((size_t)blocks + 1, sizeof *plan->block_finite);
    plan->block_room = plan->block_sum && plan->block_finite ? blocks + 1 : 0;
    return plan->block_room ? FO_OK : FO_NO_MEMORY;
}

fo_status fo_plan_prepare(fo_plan *plan)
{
    if (!take_pieces(plan, plan->n_tensors))
        return FO_NO_MEMORY;
    for (int64_t i = 0; i < plan->n_tensors; i++)
        add_piece(plan, &(fo_piece){.tensor = i, .size = plan->tensors[i].size});
    return number_blocks(plan);
}

fo_status fo_plan_prepare_pieces(fo_plan *plan, const fo_piece *pieces, int64_t n_pieces)
{
    if (!take_pieces(plan, n_pieces))
        return FO_NO_MEMORY;
    for (int64_t k = 0; k < n_pieces; k++)
        add_piece(plan, &pieces[k]);
    return number_blocks(plan);
}

fo_status fo_plan_take_rows(fo_plan *plan, int64_t *tensor, int64_t *at)
{
    if (!plan->rows)
        plan->rows = calloc((size_t)plan->n_tensors + 1, sizeof *plan->rows);
    if (!plan->rows || !take_pieces(plan, plan->n_tensors))
        return FO_NO_MEMORY;
    for (int64_t i = 0; i < plan->n_tensors; i++) {
        const fo_tensor *t = &plan->tensors[i];
        fo_rows *rows = &plan->rows[i];
        add_piece(plan, &(fo_piece){.tensor = i, .size = t->size});
        if (t->row_size == 0)
            continue;
        *tensor = i;
        const fo_status status = fo_rows_sort(rows, t, at);
        if (status)
            return status;
        const int64_t size = t->ema ? t->size : rows->n_distinct * rows->row_size;
        plan->tensor_works[i].rows = rows;
        plan->tensor_works[i].size = size;
        plan->size += size - t->size;
    }
    return number_blocks(plan);
}

void fo_plan_destroy(fo_plan *plan)
{
    if (!plan)
        return;
    for (int64_t i = 0; i < plan->n_tensors && plan->rows; i++)
        fo_rows_free(&plan->rows[i]);
    free(plan->rows);
    free(plan->tensors);
    free(plan->hypers);
    free(plan->consts);
    free(plan->tensor_works);
    free(plan->group_works);
    free(plan->codings);
    free(plan->pieces);
    free(plan->first_block);
    free(plan->block_sum);
    free(plan->block_finite);
    free(plan);
}

fo_tensor *fo_plan_tensor(fo_plan *plan, int64_t i) { return &plan->tensors[i]; }

fo_coding *fo_plan_coding(fo_plan *plan, int64_t i) { return &plan->codings[i]; }

double *fo_plan_hypers(fo_plan *plan, int32_t group)
{
    return plan->hypers + (size_t)group * FO_MAX_HYPERS;
}

int64_t fo_plan_size(const fo_plan *plan) { return plan->size; }

int64_t fo_plan_blocks(const fo_plan *plan) { return plan->n_blocks; }

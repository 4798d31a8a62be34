/* A plan's memory. Blocks of FO_BLOCK elements are numbered through all its tensors. */
#include "plan.h"
#include <stdlib.h>

fo_plan *fo_plan_create(const fo_rule *rule, int32_t n_groups, int64_t n_tensors)
{
    fo_plan *plan = calloc(1, sizeof *plan);
    if (!plan)
        return NULL;
    const size_t n = (size_t)n_tensors, groups = (size_t)n_groups;
    plan->rule = rule;
    for (int j = 0; j < FO_MAX_SLOTS; j++)
        plan->begins |= fo_rule_slot_begins(rule, j);
    plan->n_groups = n_groups;
    plan->n_tensors = n_tensors;
    plan->tensors = calloc(n + 1, sizeof *plan->tensors);
    plan->hypers = calloc(groups + 1, FO_MAX_HYPERS * sizeof *plan->hypers);
    plan->consts = calloc(n + 1, FO_MAX_CONSTS * sizeof *plan->consts);
    plan->tensor_works = calloc(n + 1, sizeof *plan->tensor_works);
    plan->group_works = calloc(groups + 1, sizeof *plan->group_works);
    plan->first_block = calloc(n + 1, sizeof *plan->first_block);
    if (plan->tensors && plan->hypers && plan->consts && plan->tensor_works && plan->group_works &&
        plan->first_block)
        return plan;
    fo_plan_destroy(plan);
    return NULL;
}

fo_status fo_plan_prepare(fo_plan *plan)
{
    int64_t blocks = 0;
    plan->size = 0;
    for (int64_t i = 0; i < plan->n_tensors; i++) {
        const int64_t size = plan->tensors[i].size;
        plan->first_block[i] = blocks;
        blocks += size / FO_BLOCK + (size % FO_BLOCK != 0);
        plan->size += size;
    }
    plan->first_block[plan->n_tensors] = plan->n_blocks = blocks;
    if (blocks < plan->block_room)
        return FO_OK;
    free(plan->block_sum);
    free(plan->block_finite);
    plan->block_sum = calloc((size_t)blocks + 1, sizeof *plan->block_sum);
    plan->block_finite = calloc((size_t)blocks + 1, sizeof *plan->block_finite);
    plan->block_room = plan->block_sum && plan->block_finite ? blocks + 1 : 0;
    return plan->block_room ? FO_OK : FO_NO_MEMORY;
}

void fo_plan_destroy(fo_plan *plan)
{
    if (!plan)
        return;
    free(plan->tensors);
    free(plan->hypers);
    free(plan->consts);
    free(plan->tensor_works);
    free(plan->group_works);
    free(plan->first_block);
    free(plan->block_sum);
    free(plan->block_finite);
    free(plan);
}

fo_tensor *fo_plan_tensor(fo_plan *plan, int64_t i) { return &plan->tensors[i]; }

double *fo_plan_hypers(fo_plan *plan, int32_t group)
{
    return plan->hypers + (size_t)group * FO_MAX_HYPERS;
}

int64_t fo_plan_size(const fo_plan *plan) { return plan->size; }

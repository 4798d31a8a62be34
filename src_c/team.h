/* The threads of a step, in three layers: a team of our own, OpenMP's regions, the caller alone. What
 * a pass computes does not depend on who does it. */
#ifndef FO_TEAM_H
#define FO_TEAM_H

#include "core.h"
#include "platform.h"

#define FO_MAX_TEAM 256

/* Does items begin to end of a pass. */
typedef void fo_task(void *context, int64_t begin, int64_t end);

/* One pass over the items, or two with a decision between them. */
typedef struct {
    fo_task *first;                 /* NULL: there is only the second */
    bool (*between)(void *context); /* in the caller's thread: whether the second follows */
    fo_task *second;
} fo_passes;

/* Who does it. */
typedef struct {
    fo_layer layer;
    bool exact;          /* all members take part, each with an even share */
    int members;         /* at most */
    const fo_pool *pool; /* that lends its threads to the team's work; NULL: none */
} fo_crew;

void fo_team_init(void);

/* Does passes over items 0 to n, each once. Members of a team take `grain` items at a time. Returns
 * how many threads took part. */
int fo_share(const fo_crew *crew, int64_t n, int64_t grain, const fo_passes *passes, void *context);

/* The share of n that is a member's own. */
static inline int64_t fo_share_begin(int64_t n, int rank, int members)
{
    return n / members * rank + (n % members < rank ? n % members : rank);
}

/* The same in one region of OpenMP's. */
#if FO_HAVE_OPENMP
FO_OPTIONAL int fo_share_in_region(int members, int64_t n, const fo_passes *passes, void *context);
FO_OPTIONAL int fo_region_processors(void);
#endif

#endif

/* The threads of a pass. What a pass computes does not depend on who does it. */
#ifndef FO_TEAM_H
#define FO_TEAM_H

#include "core.h"

#define FO_MAX_TEAM 256

/* Does items begin to end of a pass. */
typedef void fo_task(void *context, int64_t begin, int64_t end);

void fo_team_init(void);

/* Does items 0 to n, each once, with at most `members` threads, which take `grain` items at a time,
 * and which are the pool's where there is one. Returns how many threads took part. */
int fo_team_run(fo_engine engine, const fo_pool *pool, int members, int64_t n, int64_t grain,
                fo_task *task, void *context);

#endif

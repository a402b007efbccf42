#include "routers.h"

#define ROUTER(name) extern const mp_router mp_router_##name;
#include "routers.def"
#undef ROUTER

const mp_router *const mp_routers[] = {
#define ROUTER(name) &mp_router_##name,
#include "routers.def"
#undef ROUTER
};
const int mp_num_routers = sizeof mp_routers / sizeof *mp_routers;
